"""The command line: ``quietstar train | think | generate | explain | eval | doctor``, and a command for each recipe.

Exit codes: 0 done, 2 usage, 3 data, model or checkpoint, 4 a failure at run time, 75 stopped by a signal and saved,
130 stopped with nothing to save. Errors are one sentence on stderr.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate.utils import set_seed
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging
from tyro.conf import Positional, arg

from quietstar.checkpoints import native as checkpoint
from quietstar.checks import pad_id
from quietstar.cli import recipes
from quietstar.cli.options import UsageError, parse, read_config
from quietstar.cli.streams import ThoughtLines
from quietstar.config import MAY_DIFFER, AdapterConfig, Dtype, ThoughtConfig, TrainConfig
from quietstar.data.texts import DataConfig, load_data, read_utf8
from quietstar.data.thoughts import OfflineThoughts, export_thoughts
from quietstar.evaluation import anchor_choices as policies
from quietstar.evaluation import difficulty
from quietstar.evaluation.losses import evaluate, summary, token_losses
from quietstar.evaluation.questions.asking import Asking, ask
from quietstar.evaluation.questions.reading import read_questions
from quietstar.files import write_whole
from quietstar.hf.verify import verify
from quietstar.memory.processes import (
    Processes,
    chunk_count,
    count_weights,
    gathered_dtype,
    process_memory,
    step_traffic,
    traffic_table,
)
from quietstar.memory.step import environment, memory_table, step_memory
from quietstar.model import QuietStar
from quietstar.recipes.common.log import on_terminal
from quietstar.run import snapshots
from quietstar.run.processes import process_state
from quietstar.run.resume import Settings, check_folder
from quietstar.run.signals import Interrupted
from quietstar.train import train

USAGE, DATA, RUNTIME, SAVED, STOPPED = 2, 3, 4, 75, 130
CONFIG = "config.json"
Checkpoint = Annotated[str, arg(help="a checkpoint, a run's folder (its newest checkpoint), or a hub name")]


class Failure(Exception):
    """Ends the program with an exit code of its own."""

    def __init__(self, code: int, sentence: str):
        super().__init__(sentence)
        self.code = code


@dataclass
class Train:
    """Train a model to think before every token. Writes metrics, checkpoints and the options to --out."""

    model: Annotated[str, arg(help="hub name or folder of a causal language model, or of one that thinks already")]
    data: DataConfig
    thoughts: ThoughtConfig
    train: TrainConfig
    lora: AdapterConfig
    dtype: Annotated[Dtype, arg(help="of the weights")] = "float32"
    compile: Annotated[bool, arg(help="the decoder with torch.compile, which takes minutes at first")] = field(
        default=False, metadata=MAY_DIFFER
    )
    gradient_checkpointing: Annotated[bool, arg(help="compute activations again in the backward, for less memory")] = field(
        default=False, metadata=MAY_DIFFER
    )
    thoughts_from: Annotated[str, arg(help="a .jsonl or .parquet file of thoughts about these texts; default sampled")] = ""
    config: Annotated[str, arg(help=f"json or yaml file of options, such as a run's {CONFIG}; typed ones win")] = field(
        default="", metadata=MAY_DIFFER
    )
    resume: Annotated[str, arg(help="auto, as is --resume alone: from the newest whole checkpoint of --out; or its path")] = (
        field(default="", metadata=MAY_DIFFER)
    )

    def run(self) -> None:
        check_folder(self.train.out, "checkpoints", bool(snapshots.every(self.train.out)), bool(self.resume))
        set_seed(self.train.seed)  # for the mixing head, which begins at random
        tokenizer = load_tokenizer(self.model)
        data = load_data(self.data, tokenizer, self.thoughts.lookahead)
        qs = load_model(self.model, self.thoughts, tokenizer, self.dtype)
        if self.lora.lora_rank:
            qs.add_adapters(self.lora)
        if self.gradient_checkpointing:
            qs.gradient_checkpointing_enable()
        if self.compile:
            qs.compile()
        examples = OfflineThoughts(self.thoughts_from, data.train, qs) if self.thoughts_from else data.train
        evaluation = None
        if len(data.held_out) >= 2:
            size = max(1, self.train.batch_size // self.train.accumulation)
            evaluation = partial(evaluate, examples=data.held_out, batch_size=size)
        self._check_same_run()
        try:
            self._say(f"{len(data.train):,} examples to train on, {len(data.held_out):,} texts held out, to {self.train.out}")
            self._write_config()
            metrics = train(qs, examples, self.train, evaluate=evaluation, resume=self.resume or None)
        except Interrupted as stop:
            process_state().destroy_process_group()
            again = f"quietstar train --config {shlex.quote(str(Path(self.train.out) / CONFIG))} --resume"
            raise Failure(SAVED, f"stopped by a signal and saved {stop.checkpoint}; go on with: {again}") from stop
        except (OSError, FloatingPointError, torch.OutOfMemoryError) as error:
            raise Failure(RUNTIME, f"{sentence(error)}; {self._last_whole()}") from error
        if metrics and "eval_gain" in metrics[-1]:
            self._say(evaluation_text({name.removeprefix("eval_"): value for name, value in metrics[-1].items()}))
        self._say(f"saved {snapshots.folder(self.train.out, self.train.steps)}")
        process_state().destroy_process_group()

    def options(self) -> dict[str, Any]:
        """Every option by its name, as ``--config`` takes them."""
        own = {name: getattr(self, name) for name in ("model", "dtype", "compile", "gradient_checkpointing", "thoughts_from")}
        return own | asdict(self.data) | asdict(self.thoughts) | asdict(self.lora) | asdict(self.train)

    def _say(self, text: str) -> None:
        if process_state().is_main_process:
            print(text)

    def _write_config(self) -> None:
        if process_state().is_main_process and not snapshots.every(self.train.out):
            Path(self.train.out).mkdir(parents=True, exist_ok=True)
            write_whole(Path(self.train.out) / CONFIG, json.dumps(self.options(), indent=2) + "\n")

    def _check_same_run(self) -> None:
        """Model, data and thoughts as the run began with; ``train`` checks the rest."""
        run = Path(self.train.out) if self.resume == "auto" else Path(self.resume).parent.parent
        if not self.resume or not snapshots.every(run) or not (run / CONFIG).exists():
            return
        Settings.of(self, self.data, self.lora).check(run, read_config(run / CONFIG))

    def _last_whole(self) -> str:
        path = snapshots.newest_whole(self.train.out)
        return f"the last whole checkpoint is {path}" if path else "no checkpoint was written yet"


@dataclass
class Think:
    """Print what a model thinks at the tokens of a text, or write its thoughts about the texts of a data set to a file."""

    model: Checkpoint
    data: DataConfig
    prompt: Positional[Annotated[str | None, arg(metavar="TEXT", help="what to think about; or give --export")]] = None
    at: Annotated[tuple[int, ...], arg(help="tokens to think at, from 0; -1 is the last; default all")] = ()
    seed: Annotated[int | None, arg(help="sample the thoughts with this seed; default the likeliest token each time")] = None
    export: Annotated[str, arg(help="a .jsonl or .parquet file for sampled thoughts about what --data has to train on")] = ""
    batch_size: Annotated[int, arg(help="texts at once, with --export")] = 8

    def run(self) -> None:
        if (self.prompt is not None) == bool(self.export):
            raise UsageError("think takes a text or --export, one of the two")
        if self.export:
            self._export()
        else:
            self._print(self.prompt or "")

    def _export(self) -> None:
        if self.at:
            raise UsageError(f"--at goes with a text, not with --export, got {self.at}")
        if self.batch_size < 1:
            raise UsageError(f"--batch-size must be 1 or more, got {self.batch_size}")
        if Path(self.export).resolve() == Path(self.data.data).resolve():
            raise UsageError(f"--export must be another file than the texts, got {self.export}")
        qs = load_checkpoint(self.model)
        examples = load_data(self.data, text_tokenizer(qs), qs.thought_config.lookahead).train
        export_thoughts(qs, examples, self.export, self.seed or 0, self.batch_size, sys.stderr.isatty())
        print(f"wrote thoughts about {len(examples):,} texts to {self.export}")

    def _print(self, prompt: str) -> None:
        qs = load_checkpoint(self.model)
        ids = text_tokenizer(qs)(prompt, return_tensors="pt")["input_ids"].long().to(qs.start_embedding.device)
        L = ids.shape[1]
        if not L:
            raise ValueError("the prompt has no tokens")
        for place in self.at:
            if not -L <= place < L:
                raise ValueError(f"--at must be from {-L} to {L - 1} in a text of {L} tokens, got {place}")
        places = sorted({place % L for place in self.at}) if self.at else list(range(L))
        anchors = torch.tensor([places], device=ids.device)
        thoughts = qs.think(ids, anchors=anchors, seed=self.seed or 0, greedy=self.seed is None).thought_ids[0]
        decode = text_tokenizer(qs).decode
        for place, several in zip(places, thoughts.tolist(), strict=True):
            shown = several[:1] if self.seed is None else several
            print(f"{place:>5}  {decode(ids[0, place])!r:<16}  {'  |  '.join(repr(decode(one)) for one in shown)}")


@dataclass
class Generate:
    """Continue a text, with a thought before each token; prints the new text as it comes."""

    model: Checkpoint
    prompt: Annotated[str, arg(metavar="TEXT", help="what to continue")]
    think: Annotated[str, arg(help="always, never, or where the model's entropy exceeds this number of nats")] = "always"
    thoughts: Annotated[int, arg(help="N, thoughts whose predictions are averaged, where they are sampled")] = 1
    sample_thoughts: Annotated[bool, arg(help="sample thoughts; default the likeliest token each time")] = False
    show_thoughts: Annotated[bool, arg(help="print a line for each new token, with the thoughts before it")] = False
    max_new_tokens: Annotated[int, arg(help="how many tokens at most")] = 100
    temperature: Annotated[float, arg(help="of the text's tokens; 0 takes the likeliest each time")] = 0.0
    top_p: Annotated[float | None, arg(help="sample from the likeliest tokens of this probability; default the model's")] = None
    top_k: Annotated[int | None, arg(help="sample from this many of the likeliest tokens; default the model's")] = None
    seed: Annotated[int | None, arg(help="fixes what is sampled; default another each time")] = None

    def run(self) -> None:
        think = _think(self.think)
        if self.temperature < 0:
            raise UsageError(f"--temperature must be 0 or more, got {self.temperature}")
        qs = load_checkpoint(self.model)
        tokenizer = text_tokenizer(qs)
        inputs = tokenizer(self.prompt, return_tensors="pt").to(qs.start_embedding.device)
        if not inputs["input_ids"].numel():
            raise ValueError("the prompt has no tokens")
        if self.seed is not None:
            set_seed(self.seed)
        options: dict[str, Any] = {"do_sample": self.temperature > 0}
        if options["do_sample"]:
            options |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        if self.show_thoughts:
            lines = ThoughtLines(tokenizer)
            options |= {"streamer": lines, "on_thoughts": lines.on_thoughts}
        else:
            options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        qs.generate(
            inputs["input_ids"].long(),
            inputs["attention_mask"],
            max_new_tokens=self.max_new_tokens,
            think=think,
            thoughts=self.thoughts,
            sample_thoughts=self.sample_thoughts,
            pad_token_id=pad_id(qs.config),
            **{name: value for name, value in options.items() if value is not None},
        )


@dataclass
class Eval:
    """Measure what thoughts are worth, with intervals: on held-out texts, or with --questions the share answered right."""

    model: Checkpoint
    data: DataConfig
    all: Annotated[bool, arg(help="take every text of the data, for data that was not trained on")] = False
    questions: Annotated[str, arg(help="a .jsonl file of questions with answers, a hub name, or name:subset on the hub")] = ""
    questions_split: Annotated[str, arg(help="split of a hub data set of questions")] = "test"
    limit: Annotated[int | None, arg(help="questions to ask, from the start; default all")] = None
    think: Annotated[str, arg(help="always, never, or where the model's entropy exceeds this number of nats")] = "always"
    max_new_tokens: Annotated[int, arg(help="of an answer")] = 256
    answer_prefix: Annotated[str, arg(help='how an answer begins, such as " Let\'s think step by step."')] = ""
    votes: Annotated[int, arg(help="answers to sample to each question, for a majority; 0 for none")] = 0
    temperature: Annotated[float, arg(help="of sampled answers")] = 0.7
    seed: Annotated[int, arg(help="of sampled answers")] = 0
    batch_size: Annotated[int, arg(help="texts or questions at once")] = 8
    out: Annotated[str, arg(help="file for the figures; a page or a plot gets the same name with .md or .png")] = "eval.json"

    def run(self) -> None:
        out = Path(self.out)
        if not out.parent.is_dir() or out.is_dir() or out.suffix in (".md", ".png"):
            raise UsageError(f"--out must be a file for json in a folder that is there, got {self.out}")
        if out.exists() and out.resolve() in (Path(self.questions).resolve(), Path(self.data.data).resolve()):
            raise UsageError(f"--out must be another file than the questions or texts, got {self.out}")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit must be 1 or more, got {self.limit}")
        if self.batch_size < 1:
            raise UsageError(f"--batch-size must be 1 or more, got {self.batch_size}")
        if self.questions:
            self._ask()
        else:
            self._read()

    def _ask(self) -> None:
        try:
            asking = Asking(
                _think(self.think),
                self.max_new_tokens,
                self.answer_prefix,
                self.votes,
                self.temperature,
                self.seed,
                self.batch_size,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        questions = read_questions(self.questions, self.questions_split, self.limit)
        qs = load_checkpoint(self.model)
        text_tokenizer(qs)
        report = ask(qs, questions, asking, sys.stderr.isatty())
        written = report.save(self.out)
        print(f"{len(questions):,} questions\n{report.table}\nwrote {' and '.join(map(str, written))}")

    def _read(self) -> None:
        qs = load_checkpoint(self.model)
        config = dataclasses.replace(self.data, pack=False, held_out=0) if self.all else self.data
        data = load_data(config, text_tokenizer(qs), qs.thought_config.lookahead)
        examples = data.train if self.all else data.held_out
        losses = token_losses(qs, examples, self.batch_size, sys.stderr.isatty())
        figures, tenths = summary(losses), difficulty.by_difficulty(losses)
        by_choice = policies.by_anchor_choice(qs, examples, losses, self.batch_size)
        print(f"{evaluation_text(figures)}\n{difficulty.text(tenths)}\n{policies.text(by_choice)}")
        values = {
            "model": self.model,
            **asdict(self.data),
            **figures,
            "by_difficulty": tenths,
            "by_anchor_choice": by_choice,
        }
        write_whole(self.out, json.dumps(values, indent=2) + "\n")
        if difficulty.can_draw():
            difficulty.draw(tenths, Path(self.out).with_suffix(".png"))
        else:
            print("no plot: matplotlib is not installed")


@dataclass
class Explain:
    """Write a page that shows what thinking does to each token of a text: thoughts, weights, probabilities."""

    model: Checkpoint
    text: Positional[Annotated[str, arg(metavar="TEXT", help="the text; or give --file")]] = ""
    file: Annotated[str, arg(help="a UTF-8 file with the text")] = ""
    out: Annotated[tuple[str, ...], arg(help="pages to write; all numbers where the name ends in .json")] = ("explain.html",)
    seed: Annotated[int | None, arg(help="sample N thoughts with this seed; default the likeliest token each time")] = None

    def run(self) -> None:
        if bool(self.text) == bool(self.file):
            raise ValueError("explain takes a text or --file, one of the two")
        if self.file and Path(self.file).resolve() in (Path(path).resolve() for path in self.out):
            raise ValueError(f"--out must be another file than the text, got {self.file}")
        report = load_checkpoint(self.model).explain(self.text or read_utf8(Path(self.file)), self.seed)
        for path in self.out:
            report.save(path)
        print(f"{explanation_text(report.summary)}\nwrote {' and '.join(self.out)}")


@dataclass
class Doctor:
    """Print versions, devices and back ends; with --model, also the memory that a training step needs in a process, and what
    it sends to the others.
    """

    thoughts: ThoughtConfig
    lora: AdapterConfig
    model: Annotated[str, arg(help="hub name or folder; only its config is read")] = ""
    batch_size: Annotated[int, arg(help="texts at once: the batch by accumulation and processes")] = 1
    length: Annotated[int, arg(help="L, tokens of a text")] = 256
    dtype: Annotated[Dtype, arg(help="of the weights")] = "float32"
    precision: Annotated[Literal["no", "bf16", "fp16"], arg(help="mixed precision")] = "no"
    processes: Annotated[int, arg(help="how many train together")] = 1
    sharding: Annotated[Literal["no", "full_shard", "shard_grad_op"], arg(help="over the processes")] = "no"
    anchor_chunk: Annotated[int | None, arg(help="anchors of each text at a time")] = None
    verify: Annotated[bool, arg(help="also load the weights, and compare thoughts with ordinary forwards")] = False

    def run(self) -> None:
        print(environment())
        if not self.model:
            return
        config = reach(self.model, "model", lambda: AutoConfig.from_pretrained(find(self.model)))
        if min(self.processes, self.batch_size, self.length, self.anchor_chunk or 1) < 1:
            raise UsageError("--processes, --batch-size, --length and --anchor-chunk must be 1 or more")
        dtype = getattr(torch, self.dtype)
        processes = Processes(self.processes, self.sharding, dtype, gathered_dtype(dtype, self.precision))
        memory = step_memory(config, self.thoughts, self.batch_size, self.length, processes.computed, self.anchor_chunk)
        weights = count_weights(config, self.lora)
        memory = process_memory(memory, weights, processes)
        rows = self.batch_size * self.length * (1 + self.thoughts.thoughts * self.thoughts.rows)
        size = f"{self.batch_size} x {self.length} tokens, {rows:,} rows with thoughts"
        print(f"\n{self.model}: a step on {size}, needs about\n{memory_table(memory)}")
        if self.processes > 1:
            traffic = step_traffic(weights, self.thoughts, processes, chunk_count(self.length, self.anchor_chunk))
            print(f"\nwhat {self.processes} processes exchange in a step\n{traffic_table(traffic, processes)}")
        if self.verify:
            model = reach(self.model, "model", lambda: AutoModelForCausalLM.from_pretrained(find(self.model), dtype=self.dtype))
            print(f"thoughts against ordinary forwards: {verify(model)}")


def load_tokenizer(name: str) -> Any:
    return reach(name, "tokenizer", lambda: AutoTokenizer.from_pretrained(find(name)))


def load_model(name: str, thoughts: ThoughtConfig, tokenizer: Any, dtype: str) -> QuietStar:
    """Around a plain language model, or one that thinks already, which then goes on with ``thoughts``."""
    path = find(name)
    if not reach(name, "model", lambda: checkpoint.thinks(path)):
        model = reach(name, "model", lambda: AutoModelForCausalLM.from_pretrained(path, dtype=dtype))
        return QuietStar(model, thoughts, tokenizer)
    qs = QuietStar.from_pretrained(path, dtype=dtype)
    scale = qs.thought_config.embedding_scale
    if scale != thoughts.embedding_scale:
        raise ValueError(f"{name}: it was made with embedding_scale={scale}, not {thoughts.embedding_scale}")
    qs.use_config(thoughts)
    return qs


def load_checkpoint(name: str) -> QuietStar:
    qs = QuietStar.from_pretrained(find(name)).eval()
    return qs.to("cuda") if torch.cuda.is_available() else qs


def text_tokenizer(qs: QuietStar) -> Any:
    if qs.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer")
    return qs.tokenizer


def _think(think: str) -> str | float:
    if think in ("always", "never"):
        return think
    try:
        nats = float(think)
    except ValueError:
        nats = -1
    if not 0 <= nats < float("inf"):
        raise UsageError(f"--think must be always, never or a number of nats, 0 or more, got {think}")
    return nats


def find(name: str) -> str:
    """A run's newest checkpoint, where ``name`` is a run's folder."""
    checkpoints = snapshots.every(name)
    return str(checkpoints[-1]) if checkpoints else name


def reach(name: str, what: str, load: Callable[[], Any]) -> Any:
    """What ``load`` returns; one sentence for the many ways in which transformers says that it can't."""
    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{name}: no {what} loads from this folder or hub name: {sentence(error)}") from error


def evaluation_text(figures: dict[str, float]) -> str:
    low, high = figures["gain_low"], figures["gain_high"]
    return (
        f"held-out loss, nats a token, {figures['tokens']:,} tokens of {figures['texts']} texts\n"
        f"  language model      {figures['base']:.4f}\n"
        f"  with thoughts       {figures['mixed']:.4f}\n"
        f"  gain from thoughts  {figures['gain']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}"
    )


def explanation_text(figures: dict[str, float]) -> str:
    low, high = figures["gain_low"], figures["gain_high"]
    return (
        f"loss of {figures['tokens']:,} tokens {figures['base']:.4f} nats without thoughts, {figures['mixed']:.4f} with them: "
        f"gain {figures['gain']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}; "
        f"{figures['helped']:.0%} of the tokens helped, {figures['hurt']:.0%} hurt"
    )


def sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


COMMANDS = {
    "train": Train,
    "think": Think,
    "generate": Generate,
    "explain": Explain,
    "eval": Eval,
    "doctor": Doctor,
} | recipes.COMMANDS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``SystemExit`` after --help and on options that can't be read."""
    logging.disable_progress_bar()
    try:
        with on_terminal():
            parse(COMMANDS, list(sys.argv[1:] if arguments is None else arguments)).run()
        return 0
    except UsageError as error:
        code, text = USAGE, str(error)
    except Failure as error:
        code, text = error.code, str(error)
    except ValueError as error:
        code, text = DATA, sentence(error)
    except Interrupted as stop:
        code, text = SAVED, f"{stop}; --resume goes on"
    except (OSError, FloatingPointError) as error:
        code, text = RUNTIME, sentence(error)
    except KeyboardInterrupt:
        code, text = STOPPED, "stopped, and nothing was saved after the last checkpoint or round"
    print(f"quietstar: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
