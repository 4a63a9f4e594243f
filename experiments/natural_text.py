"""Does thinking help on natural text? Quiet-STaR on mathematical web pages, against its controls, as one command.

    python experiments/natural_text.py --cost    the memory and the GPU hours that it needs, worked out before anything runs
    python experiments/natural_text.py           the experiment; the same line continues one that was stopped
    python experiments/natural_text.py --tiny    all of it on a CPU in a minute, with a random model, to see that it runs

A language model is trained on the same texts in several ways, its arms: without thoughts (plain), and with Quiet-STaR. Each is
measured on held-out texts, with its own thoughts, another text's, one constant thought and random tokens, and on the questions
of GSM8K and CommonsenseQA, by the published probability of the right answer and by exact match. Every phase leaves a JSON file
in the folder and is skipped when that is there; training resumes from its last checkpoint. docs/results.md says what which
result would mean.
"""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, NamedTuple

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import tyro  # noqa: E402
from experiments_report import markdown  # noqa: E402, from this folder
from transformers.utils import logging  # noqa: E402
from tyro.conf import OmitArgPrefixes, arg  # noqa: E402

from quietstar import QuietStar, ThoughtConfig  # noqa: E402
from quietstar.checkpoints.pretrained import load_config, load_tokenizer  # noqa: E402
from quietstar.cli.common import load_checkpoint, load_model  # noqa: E402
from quietstar.cli.entry import versions  # noqa: E402
from quietstar.cli.main import main as quietstar  # noqa: E402
from quietstar.config import MAY_DIFFER, TrainConfig  # noqa: E402
from quietstar.data.sources import hub_rows  # noqa: E402
from quietstar.data.texts import DataConfig, builtin_texts, load_data  # noqa: E402
from quietstar.data.texts import read_texts as texts_of  # noqa: E402
from quietstar.evaluation.intervals import FEW, mean_interval, wilson  # noqa: E402
from quietstar.evaluation.losses import (  # noqa: E402
    TokenLosses,
    token_losses,
    with_constant_thoughts,
    with_own_thoughts,
    with_random_thoughts,
    with_thoughts_of_another,
)
from quietstar.evaluation.questions.asking import Asking, ask  # noqa: E402
from quietstar.evaluation.questions.reading import read_questions  # noqa: E402
from quietstar.files.pictures import can_draw, legend_below, new_figure, save  # noqa: E402
from quietstar.files.reading import json_lines, read_json  # noqa: E402
from quietstar.files.writing import replaced, write_whole  # noqa: E402
from quietstar.memory.processes import Processes, count_weights, gathered_dtype, process_memory  # noqa: E402
from quietstar.memory.step import human, step_memory  # noqa: E402
from quietstar.run.batches import Example  # noqa: E402
from quietstar.run.resume import Settings  # noqa: E402
from quietstar.testing import byte_tokenizer, tiny_model  # noqa: E402

# 1. Settings. Each is an option of the command.

Arm = Literal["plain", "official", "paper", "small", "no-reinforce"]
# What the arms train with. The plain one has the text's own loss alone; its single thought a text is not trained.
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"thoughts": 1, "thought_tokens": 1, "anchors": "every", "base_weight": 1, "mix_weight": 0, "policy_weight": 0},
    "official": {"preset": "official"},
    "paper": {"preset": "paper"},
    "small": {"preset": "small"},
    "no-reinforce": {"preset": "official", "policy_weight": 0},
}
PUBLISHED = ThoughtConfig()
BASE = "base"  # the name of the model that all arms begin with
TASKS = {"gsm8k": "GSM8K", "commonsense_qa": "CommonsenseQA"}
SPLITS = {"gsm8k": "test", "commonsense_qa": "validation"}  # CommonsenseQA's test split has no answers


@dataclass(frozen=True)
class Experiment:
    """Model, data, arms and lengths. Warm-up, schedule and weight decay are those of ``quietstar train``.

    Raises:
        ValueError: a number of 0 or less, or an arm twice.
    """

    out: Annotated[str, arg(help="folder of the experiment")] = field(default="runs/natural-text", metadata=MAY_DIFFER)
    model: Annotated[str, arg(help="hub name or folder, such as Qwen/Qwen3-1.7B-Base")] = "Qwen/Qwen3-0.6B-Base"
    data: Annotated[str, arg(help="text to train on: a data set on the hub, a .jsonl or a .txt file")] = (
        "open-web-math/open-web-math"
    )
    texts: Annotated[int, arg(help="texts to read from the start of a data set on the hub")] = 10_000
    held_out: Annotated[int, arg(help="texts that are held out, at most a tenth of all")] = 512
    length: Annotated[int, arg(help="L, tokens of a text")] = 256
    arms: Annotated[tuple[Arm, ...], arg(help="ways to train; plain is without thoughts")] = field(
        default=("plain", "official"), metadata=MAY_DIFFER
    )
    seeds: Annotated[int, arg(help="how often each arm is trained")] = field(default=3, metadata=MAY_DIFFER)
    thoughts: Annotated[int, arg(help="N, thoughts sampled at every position")] = PUBLISHED.thoughts
    thought_tokens: Annotated[int, arg(help="T, tokens in a thought")] = PUBLISHED.thought_tokens
    lookahead: Annotated[int, arg(help="J, next tokens predicted after a thought")] = PUBLISHED.lookahead
    steps: Annotated[int, arg(help="optimizer steps")] = 1000
    batch_size: Annotated[int, arg(help="texts per step, over all GPUs")] = 8
    learning_rate: Annotated[float, arg(help="of all arms; 1e-3 with the arm small")] = TrainConfig.learning_rate
    accumulation: Annotated[int, arg(help="parts of a step, to save memory")] = field(default=1, metadata=MAY_DIFFER)
    checkpointing: Annotated[bool, arg(help="recompute activations, to save memory")] = field(default=True, metadata=MAY_DIFFER)
    save_every: Annotated[int, arg(help="steps between checkpoints")] = field(default=100, metadata=MAY_DIFFER)
    precision: Annotated[Literal["no", "bf16"], arg(help="of training; weights and evaluation are in fp32")] = "bf16"
    gpus: Annotated[int, arg(help="GPUs to train on; evaluation uses one")] = field(default=1, metadata=MAY_DIFFER)
    gsm8k: Annotated[str, arg(help="questions: a data set on the hub or a .jsonl file")] = "openai/gsm8k:main"
    commonsense_qa: Annotated[str, arg(help="the same, of its split validation")] = "tau/commonsense_qa"
    questions: Annotated[int, arg(help="how many of each to ask, from the start")] = 10_000
    gsm8k_tokens: Annotated[int, arg(help="most tokens of an answer")] = 256
    commonsense_qa_tokens: Annotated[int, arg(help="most tokens of an answer")] = 16
    block: Annotated[int, arg(help="questions whose answers are saved together")] = 128
    eval_batch: Annotated[int, arg(help="texts or questions evaluated at a time")] = 32

    def __post_init__(self) -> None:
        _above_0(self)
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"Experiment: arms must be different, got {', '.join(self.arms)}")
        for arm in self.arms:
            self.thought_config(arm)

    @property
    def folder(self) -> Path:
        return Path(self.out)

    @property
    def texts_file(self) -> Path:
        """The texts as they were read at first, so that a data set that changes changes nothing."""
        return self.folder / "texts.jsonl"

    def thought_config(self, arm: str) -> ThoughtConfig:
        own = {"thoughts": self.thoughts, "thought_tokens": self.thought_tokens, "lookahead": self.lookahead}
        return ThoughtConfig(**{**own, "anchor_stride": self.length, **ARMS[arm]})

    def training(self, arm: str, seed: int, out: Path) -> dict[str, Any]:
        """The options of ``quietstar train`` for one arm, by name."""
        shared = ("model", "held_out", "length", "steps", "batch_size", "accumulation", "learning_rate")
        shared += ("save_every", "precision")
        return {name: getattr(self, name) for name in shared} | {
            **self.thought_config(arm).to_dict(),
            "data": str(self.texts_file),
            "gradient_checkpointing": self.checkpointing,
            "eval_every": max(1, self.steps // 4),
            "keep": 1,
            "seed": seed,
            "out": str(out),
        }


@dataclass(frozen=True)
class Machine:
    """What the estimate assumes of a GPU."""

    tflops: Annotated[float, arg(help="for --cost: peak of a GPU in bf16; the H100 SXM's by its data sheet")] = 989.0
    tflops_fp32: Annotated[float, arg(help="for --cost: the same in fp32, for evaluation")] = 67.0
    utilization: Annotated[float, arg(help="for --cost: share of the peak that large batches reach, an assumption")] = 0.25
    layer_ms: Annotated[float, arg(help="for --cost: time of a layer where it waits for launches, an assumption")] = 0.5

    def __post_init__(self) -> None:
        _above_0(self)


def _above_0(settings: Any) -> None:
    for number in fields(settings):
        value = getattr(settings, number.name)
        if type(value) in (int, float) and value <= 0:
            raise ValueError(f"{type(settings).__name__}: {number.name} must be above 0, got {value}")


# 2. The smallest size: a random model of bytes, paragraphs of Python's manual, questions from a template.

TINY = Experiment(
    "runs/natural-text-tiny", model="", data="", gsm8k="", commonsense_qa="",  # which ``with_files`` makes
    held_out=8, length=32, arms=("plain", "small"), seeds=2, thought_tokens=3, lookahead=2, steps=4, batch_size=2,
    learning_rate=1e-3, checkpointing=False, save_every=2, precision="no", gsm8k_tokens=8, commonsense_qa_tokens=4, block=2,
    eval_batch=4,
)  # fmt: skip


def with_files(e: Experiment) -> Experiment:
    """Write model, data and questions where the settings name none, and name these."""
    folder, names = e.folder / "tiny", ("model", "data", "gsm8k", "commonsense_qa")
    if not folder.exists():
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "<end>"})
        with torch.random.fork_rng([]), replaced(folder) as beside:
            torch.manual_seed(0)
            model = tiny_model(len(tokenizer))
            model.config.eos_token_id = model.config.pad_token_id = tokenizer.eos_token_id
            model.save_pretrained(beside / "model")
            tokenizer.save_pretrained(beside / "model")
            write_rows(beside / "data.jsonl", [{"text": text} for text in builtin_texts()[:80]])
            write_rows(beside / "gsm8k.jsonl", [sum_of(i) for i in range(4)])
            write_rows(beside / "commonsense_qa.jsonl", [largest_of(i) for i in range(4)])
    made = {name: str(folder / ("model" if name == "model" else f"{name}.jsonl")) for name in names}
    return replace(e, **{name: file for name, file in made.items() if not getattr(e, name)})


def sum_of(i: int) -> dict[str, Any]:
    """A question in the form of GSM8K."""
    a, b = 3 + i, 5 + 7 * i
    answer = f"{a}+{b}=<<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"
    return {"question": f"Ann has {a} pens and buys {b}. How many has she?", "answer": answer}


def largest_of(i: int) -> dict[str, Any]:
    """A question in the form of CommonsenseQA on the hub."""
    things = ["mouse", "horse", "whale"] * 2
    things = things[i % 3 : i % 3 + 3]
    choices = {"label": list("ABC"), "text": things}
    return {"question": "Which is the largest?", "choices": choices, "answerKey": "ABC"[things.index("whale")]}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


# 3. The phases, in their order.


@dataclass(frozen=True)
class Phase:
    """A part of the experiment that is done once ``result`` is there."""

    result: Path
    work: Callable[[], dict[str, Any]]


def phases(e: Experiment) -> Iterator[Phase]:
    """All phases in their order; each may need what those before it wrote."""
    yield Phase(e.folder / "data.json", partial(freeze_data, e))
    yield from measurements(e, BASE, thinks=False)
    for seed in range(e.seeds):
        for arm in e.arms:
            name = f"{arm}-{seed}"
            yield Phase(e.folder / name / "training.json", partial(train, e, arm, seed))
            yield from measurements(e, name, thinks=arm != "plain")


def measurements(e: Experiment, name: str, thinks: bool) -> Iterator[Phase]:
    """What is measured of one model."""
    yield Phase(e.folder / name / "losses.json", partial(measure_losses, e, name, thinks))
    for task, split in SPLITS.items():
        asked = len(read_questions(str(e.folder / f"{task}.jsonl"), split))
        for start in range(0, asked, e.block):
            yield Phase(e.folder / name / f"{task}-{start:05d}.json", partial(answer, e, name, thinks, task, start))


def freeze_data(e: Experiment) -> dict[str, Any]:
    """Texts and questions in files of the folder, so that a data set that changes on the hub changes nothing here."""
    texts = texts_of(DataConfig(e.data, hub_texts=e.texts))
    write_rows(e.texts_file, [{"text": text} for text in texts])
    asked = {}
    for task, split in SPLITS.items():
        source = getattr(e, task)
        of_file = source.endswith(".jsonl")
        rows = [row for _, row in json_lines(Path(source))] if of_file else hub_rows(source, split, e.questions)
        write_rows(e.folder / f"{task}.jsonl", rows[: e.questions])
        asked[task] = len(rows[: e.questions])
    config = DataConfig(str(e.texts_file), length=e.length, held_out=e.held_out)
    data = load_data(config, load_tokenizer(e.model), e.lookahead)
    held_out = [example["input_ids"].tolist() for example in data.held_out]
    write_whole(e.folder / "held_out.json", json.dumps(held_out) + "\n")
    return {"texts": len(texts), "sha256": data.sha256, "examples": len(data.train), "held_out": len(held_out), **asked}


def train(e: Experiment, arm: str, seed: int) -> dict[str, Any]:
    """``quietstar train``, which resumes from its last checkpoint, in this process or in one for each GPU."""
    model.cache_clear()
    gc.collect()  # of the training before, what refers to itself in a circle
    out = e.folder / f"{arm}-{seed}"
    options = out / "options.json"
    out.mkdir(parents=True, exist_ok=True)
    write_whole(options, json.dumps(e.training(arm, seed, out), indent=1) + "\n")
    arguments = ["train", "--config", str(options), "--resume"]
    if e.gpus == 1:
        code = quietstar(arguments)
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={e.gpus}", "-m", "quietstar"]
        code = subprocess.run([*launcher, *arguments]).returncode
    if code:
        raise SystemExit(code)
    lines = [line for _, line in json_lines(out / "metrics.jsonl")]
    return {"steps": len(lines), "training_seconds": sum(line["seconds"] for line in lines), "last": lines[-1]}


@lru_cache(maxsize=1)
def model(e: Experiment, name: str) -> QuietStar:
    """The model of the folder ``name``, fp32, to evaluate; kept until another is asked for, or ``model.cache_clear()``.

    In bf16, most of the small steps that it was trained with would be rounded away.
    """
    model.cache_clear()  # before, or two would be on the GPU at once
    if name != BASE:
        return load_checkpoint(str(e.folder / name))
    qs = load_model(e.model, e.thought_config("plain"), load_tokenizer(e.model), "float32").eval()
    return qs.to("cuda") if torch.cuda.is_available() else qs


def measure_losses(e: Experiment, name: str, thinks: bool) -> dict[str, Any]:
    texts = [{"input_ids": torch.tensor(ids)} for ids in read_json(e.folder / "held_out.json", list[list[int]])]
    return held_out_losses(model(e, name), texts, thinks, e.eval_batch)


def held_out_losses(qs: QuietStar, texts: Sequence[Example], thinks: bool, batch_size: int) -> dict[str, list[float]]:
    """The loss of each text, the mean over its tokens in nats, by the thoughts before them.

    Returns:
        base, without a thought; and for a model that ``thinks`` own, another, constant and random.
    """
    if not thinks:
        shortest = qs.with_config(replace(qs.thought_config, thought_tokens=1))  # its thoughts are made, and not used
        return {"base": of_each_text(losses := token_losses(shortest, texts, batch_size, controls=False), losses.base)}
    own = with_own_thoughts(qs, texts, batch_size)
    ways = {
        "own": own,
        "another": with_thoughts_of_another(own),
        "constant": with_constant_thoughts(own),
        "random": with_random_thoughts(own, qs.lm_head.linear.out_features),
    }
    found = {way: token_losses(qs, examples, batch_size, controls=False) for way, examples in ways.items()}
    without = {"base": of_each_text(found["own"], found["own"].base)}
    return without | {way: of_each_text(losses, losses.mixed) for way, losses in found.items()}


def of_each_text(losses: TokenLosses, values: Any) -> list[float]:
    return (losses.text.bincount(values) / losses.text.bincount()).tolist()


def answer(e: Experiment, name: str, thinks: bool, task: str, start: int) -> dict[str, Any]:
    """One block of questions with its answers: under base without thoughts, under thinking with them."""
    questions = read_questions(str(e.folder / f"{task}.jsonl"))[start : start + e.block]
    tokens = getattr(e, f"{task}_tokens")
    asking = Asking("always" if thinks else "never", max_new_tokens=tokens, batch_size=e.eval_batch)
    return {"questions": ask(model(e, name), questions, asking).to_dict()["questions"]}


# 4. What it would cost: memory by the estimate of ``quietstar doctor``, GPU hours by counting operations. Nothing here is
# measured. A multiplication and an addition are two operations. A backward pass counts twice a forward one (Kaplan et al.,
# arXiv 2001.08361, section 2.1), a recomputed forward pass once more.

# The questions of GSM8K's test split and CommonsenseQA's validation split, and a guess of how long a prompt is.
QUESTIONS = {"gsm8k": 1319, "commonsense_qa": 1221}
PROMPT = 128  # tokens
CONTROLS = 4  # own thoughts, another text's, constant, random
EVALUATIONS = 5  # before the first step and after each quarter; with own thoughts and another text's


class Work(NamedTuple):
    """Floating-point operations, and passes through the decoder one after another, each for few rows."""

    operations: float
    passes: int = 0


@dataclass(frozen=True)
class Model:
    """The sizes that operations depend on: weights of all layers, V x D, layers, the width of all heads, and D."""

    weights: int
    vocabulary: int
    layers: int
    attention: int
    width: int

    @classmethod
    def of(cls, config: Any) -> Model:
        text = config.get_text_config()
        heads = text.num_attention_heads
        head = getattr(text, "head_dim", None) or text.hidden_size // heads
        D = text.hidden_size
        return cls(count_weights(config).layers, text.vocab_size * D, text.num_hidden_layers, heads * head, D)

    def forward(self, rows: float, context: float, logits: float, mixed: float = 0) -> float:
        """Operations of rows that attend to ``context`` others each, of which so many go to the LM head and the mixing head."""
        attention = 4 * self.layers * self.attention * context * rows
        return 2 * self.weights * rows + attention + 2 * self.vocabulary * logits + 6 * self.width**2 * mixed

    def step(self, e: Experiment, thoughts: ThoughtConfig) -> float:
        """An optimizer step: the rollout, then the forward and backward pass over text and thoughts."""
        L, N, T, J = e.length, thoughts.thoughts, thoughts.thought_tokens, thoughts.lookahead
        P = math.ceil(L / thoughts.anchor_stride) if thoughts.anchors == "every" else L
        context = L / 2 + thoughts.rows / 2
        rollout = self.forward(L + P * N * T, context, P * N * T)
        packed = self.forward(L + P * N * thoughts.rows, context, 0, P * N * J)
        head = self.forward(0, 0, L + P * N * (J + T))  # the LM head's operation recomputes its logits in the backward pass
        return e.batch_size * (rollout + (4 if e.checkpointing else 3) * packed + 4 * head)

    def losses(self, e: Experiment, T: int, ways: int) -> Work:
        """The losses of the held-out texts in some ways, with thoughts that are made once."""
        L, context = e.length, e.length / 2 + T / 2
        one = self.forward(L + L * T, context, L * T) + ways * self.forward(L + L * (T + 2), context, 2 * L, L)
        return Work(e.held_out * one)

    def answers(self, e: Experiment, task: str, T: int) -> Work:
        """Answers of full length to all questions of a task; T is 0 for a model that doesn't think."""
        questions, new = min(e.questions, QUESTIONS[task]), getattr(e, f"{task}_tokens")
        rows = T + 3 if T else 1  # for each new token: itself, and the start, the tokens and the end of a thought
        operations = self.forward(PROMPT + new * rows, PROMPT + new / 2, new * rows, new if T else 0)
        return Work(questions * operations, math.ceil(questions / e.eval_batch) * new * rows)


def cost(e: Experiment, machine: Machine) -> str:
    """The memory of a step and a table of hours, as text."""
    config = load_config(e.model)
    return f"{memory(e, config)}\n\n{hours(e, config, machine)}"


def memory(e: Experiment, config: Any) -> str:
    """Of training with thoughts on each GPU, and of evaluation; the arms differ little."""
    thoughts = e.thought_config(next((arm for arm in e.arms if arm != "plain"), "plain"))
    texts = max(1, math.ceil(e.batch_size / (e.gpus * e.accumulation)))
    processes = Processes(e.gpus, "no", torch.float32, gathered_dtype(torch.float32, e.precision))
    weights = count_weights(config)
    step = process_memory(step_memory(config, thoughts, texts, e.length, processes.computed), weights, processes)
    one = ThoughtConfig(thoughts=1, thought_tokens=e.thought_tokens, lookahead=1)
    held_out = step_memory(config, one, e.eval_batch, e.length)
    checkpoint = 3 * weights.bytes(torch.float32)
    return (
        f"memory of training: {human(step.peak(e.checkpointing))} on each GPU, {texts} texts at a time\n"
        f"memory of evaluation: {human(held_out.weights + held_out.rollout)}, {e.eval_batch} texts at a time\n"
        f"disk: {human((len(e.arms) * e.seeds + 1) * checkpoint)} for checkpoints with their optimizer state"
    )


def works(e: Experiment, model: Model) -> Iterator[tuple[str, int, Work, str]]:
    """What is done, how often, the work of each time, and its precision."""
    T, arms = e.thought_tokens, {arm: e.thought_config(arm) for arm in e.arms}
    models = e.seeds * sum(arm != "plain" for arm in arms)
    others = 1 + e.seeds * len(arms) - models  # the base model and the plain ones
    for arm, thoughts in arms.items():
        yield f"training, {arm}", e.seeds, Work(e.steps * model.step(e, thoughts)), e.precision
    yield "held-out texts, during training", EVALUATIONS * e.seeds * len(arms), model.losses(e, T, 2), e.precision
    yield "held-out texts, without thoughts", others, model.losses(e, 1, 1), "no"
    yield "held-out texts, with all thoughts", models, model.losses(e, T, CONTROLS), "no"
    for task in QUESTIONS:
        without, thinking = model.answers(e, task, 0), model.answers(e, task, T)
        yield f"{task}, without thoughts", others, without, "no"
        yield f"{task}, with and without", models, Work(*map(sum, zip(without, thinking, strict=True))), "no"


def hours(e: Experiment, config: Any, machine: Machine) -> str:
    sizes, total = Model.of(config), 0.0
    wait = machine.layer_ms / 1000 * sizes.layers
    lines = [f"{'':<36}{'times':>6}{'PFLOP each':>12}{'in a row':>10}{'GPU hours':>11}"]
    for name, times, work, precision in works(e, sizes):
        speed = 1e12 * machine.utilization * (machine.tflops if precision == "bf16" else machine.tflops_fp32)
        spent = times * max(work.operations / speed, work.passes * wait) / 3600
        total += spent
        lines.append(f"{name:<36}{times:>6}{work.operations / 1e15:>12,.1f}{work.passes:>10,}{spent:>11.2f}")
    lines.append(f"{'together':<64}{total:>11.2f}")
    return "\n".join(lines) + (
        "\n\nAn estimate, not a measurement. Hours are the larger of two: the operations at "
        f"{machine.utilization:.0%} of {machine.tflops:g} TFLOP/s in bf16\n"
        f"and {machine.tflops_fp32:g} in fp32, and the passes in a row, each of {sizes.layers} layers at "
        f"{machine.layer_ms:g} ms. Answers are taken to have\n"
        f"full length, and prompts {PROMPT} tokens. Reading data and saving come on top."
    )


# 5. The page: every arm on every measure, and what thinking gains over each of its controls.

Scores = list[list[float]]  # of one model and one measure: for each seed a value for each text or question
LOSS = "held-out loss"
MEASURES = {
    LOSS: "nats per token",
    "GSM8K, probability": "of the right answer, among answer tokens",
    "GSM8K, exact match": "of the greedy answer",
    "CommonsenseQA, probability": "of the right answer, among answer tokens",
    "CommonsenseQA, exact match": "of the greedy answer",
}
START, PLAIN = "base model", "trained without thoughts"
WITHOUT, OWN, ANOTHER = "without a thought", "own thoughts", "another text's thoughts"
CONSTANT, RANDOM = "one constant thought", "random tokens"
WAYS = {"base": WITHOUT, "own": OWN, "another": ANOTHER, "constant": CONSTANT, "random": RANDOM}
OVER_PLAIN = "over training without thoughts"
# Each gain of an arm that thinks: of the first over the second. Both parts first, then what own thoughts must beat besides.
GAINS = {
    "of thinking": (OWN, WITHOUT),
    "of mixing": (ANOTHER, WITHOUT),
    "of content": (OWN, ANOTHER),
    "over one constant thought": (OWN, CONSTANT),
    "over random tokens": (OWN, RANDOM),
    OVER_PLAIN: (OWN, PLAIN),
    "over the base model": (OWN, START),
}
NEEDED = ("of thinking", "of content", "over one constant thought", OVER_PLAIN)


@dataclass(frozen=True)
class Figure:
    """A mean over texts or questions of the mean over seeds, with its 95 % interval over texts or questions.

    The interval of a share of right answers is Wilson's, others are by Student's t. ``units`` is how many there are.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: list[float]
    units: int

    @classmethod
    def of(cls, scores: Scores, share: bool = False) -> Figure:
        units = [fmean(unit) for unit in zip(*scores, strict=True)]
        mean, low, high = mean_interval(units)
        if share:
            low, high = wilson(round(mean * len(units)), len(units))
        return cls(mean, low, high, [fmean(seed) for seed in scores], len(units))

    @classmethod
    def gain(cls, first: Scores, second: Scores, less: bool) -> Figure:
        """What the first gain over the second, text by text; with ``less``, smaller values are better."""
        sign = -1 if less else 1
        pairs = zip(first, second * len(first) if len(second) == 1 else second, strict=True)
        return cls.of([[sign * (x - y) for x, y in zip(one, other, strict=True)] for one, other in pairs])


Gains = dict[tuple[str, str], Figure]  # of an arm, by name and measure


def write(e: Experiment) -> str:
    """Write report.md, results.json and, with matplotlib, report.png; returns the page."""
    scores = collect(e)
    rows = {
        name: {measure: Figure.of(values, "exact match" in measure) for measure, values in row.items()}
        for name, row in scores.items()
    }
    gains = {arm: gains_of(scores, arm) for arm in e.arms if arm != "plain"}
    values = {
        "versions": versions(),
        "rows": {name: {measure: vars(figure) for measure, figure in row.items()} for name, row in rows.items()},
        "gains": {arm: {f"{name}: {m}": vars(x) for (name, m), x in found.items()} for arm, found in gains.items()},
    }
    write_whole(e.folder / "results.json", json.dumps(values, indent=1) + "\n")
    drawn = bool(gains) and draw(gains, e.folder / "report.png")
    page = "\n\n".join(sections(e, rows, gains, drawn)) + "\n"
    write_whole(e.folder / "report.md", page)
    return page


def collect(e: Experiment) -> dict[str, dict[str, Scores]]:
    """The scores of each row of the first table, by measure."""
    rows = {START: of_model([measured(e, BASE)], "base")}
    for arm in e.arms:
        found = [measured(e, f"{arm}-{seed}") for seed in range(e.seeds)]
        if arm == "plain":
            rows[PLAIN] = of_model(found, "base")
        else:
            rows |= {f"{arm}, {name}": of_model(found, way) for way, name in WAYS.items()}
    return rows


def measured(e: Experiment, name: str) -> dict[str, Any]:
    """What was measured of one model: losses, and the questions of each task."""
    folder = e.folder / name
    found: dict[str, Any] = {"losses": read_json(folder / "losses.json", dict[str, Any])}
    for task in TASKS:
        blocks = [read_json(path, dict[str, Any])["questions"] for path in sorted(folder.glob(f"{task}-*.json"))]
        found[task] = [question for block in blocks for question in block]
    return found


def of_model(found: list[dict[str, Any]], way: str) -> dict[str, Scores]:
    """The scores with one kind of thoughts; questions are asked without thoughts and with own ones alone."""
    scores = {LOSS: [one["losses"][way] for one in found]}
    mode = {"base": "base", "own": "thinking"}.get(way)
    for task, title in TASKS.items() if mode else ():
        scores[f"{title}, probability"] = [[q[mode]["probability"] for q in one[task]] for one in found]
        scores[f"{title}, exact match"] = [[float(q[mode]["extracted"] == q["answer"]) for q in one[task]] for one in found]
    return scores


def gains_of(rows: dict[str, dict[str, Scores]], arm: str) -> Gains:
    """The gains of an arm where both sides were measured."""
    found = {}
    for name, (first, second) in GAINS.items():
        one, other = rows[f"{arm}, {first}"], rows.get(second) or rows.get(f"{arm}, {second}", {})
        for measure in MEASURES:
            if measure in one and measure in other:
                found[name, measure] = Figure.gain(one[measure], other[measure], less=measure == LOSS)
    return found


def sections(e: Experiment, rows: dict[str, dict[str, Figure]], gains: dict[str, Gains], drawn: bool) -> Iterator[str]:
    data = read_json(e.folder / "data.json", dict[str, Any])
    asked = " and ".join(f"{data[task]:,} questions of {title}" for task, title in TASKS.items())
    # Of all phases, without what was lost when one was stopped; for training the sum of its steps.
    results = [read_json(path, dict[str, Any]) for path in e.folder.glob("*/*.json") if path.name != "options.json"]
    spent = sum(x.get("training_seconds", x.get("seconds", 0)) for x in results) / 3600
    yield "# Quiet-STaR on natural text"
    yield (
        f"Model `{e.model}`, text `{e.data}`. Each arm is trained {e.seeds} times on {e.steps * e.batch_size * e.length:,} "
        f"tokens in {e.steps:,} steps. {data['held_out']:,} held-out texts, {asked}, zero-shot. Means over seeds, with 95 % "
        f"intervals over texts or questions. All phases took {spent:.2f} hours, with {versions()}."
    )
    yield markdown(["", *MEASURES], [[name, *(cell(row.get(m), m) for m in MEASURES)] for name, row in rows.items()])
    yield "\n".join(f"- {name}: {what}" for name, what in MEASURES.items())
    if drawn:
        yield "![Gains of thinking with their intervals](report.png)"
    for arm, found in gains.items():
        yield f"## What thinking gains: {arm}"
        names = list(dict.fromkeys(name for name, _ in found))
        yield markdown(["gain", *MEASURES], [[n, *(cell(found.get((n, m)), m, "+") for m in MEASURES)] for n in names])
        yield f"In nats per token, and in percentage points. Thinking is mixing and content together. {verdict(found)}"
        if e.seeds > 1:
            by_seed = {name: found[name, LOSS].seeds for name in NEEDED if (name, LOSS) in found}
            said = "; ".join(f"{name} {', '.join(f'{seed:+.4f}' for seed in seeds)}" for name, seeds in by_seed.items())
            yield f"By seed: {said}. The intervals are over texts, so they don't hold what seeds differ by."


def verdict(found: Gains) -> str:
    """Thinking helped if own thoughts predict held-out text better than everything in ``NEEDED``."""
    thinking, content = found["of thinking", LOSS], found["of content", LOSS]
    if thinking.units < FEW:
        return f"{thinking.units} held-out texts are too few to say what thinking does."
    if thinking.high is not None and thinking.high < 0:
        less = content.low is not None and content.low > 0
        return "Thinking hurts on held-out text" + ("; its own thoughts hurt less than another text's." if less else ".")
    compared = {name: found[name, LOSS] for name in NEEDED if (name, LOSS) in found}
    failed = [name for name, gain in compared.items() if gain.low is None or gain.low <= 0]
    if len(compared) < len(NEEDED):
        return "Whether thinking is worth its training can't be said: there is no arm `plain` to compare it with."
    if failed:
        return f"No gain from what was thought is shown. Not above 0 with its interval: gain {', '.join(failed)}."
    least = min(compared.values(), key=lambda gain: gain.mean)
    names = ", ".join(NEEDED)
    return f"Thinking helped on held-out text, by {cell(least, LOSS, '+')}, the least of what is above 0: gain {names}."


def cell(figure: Figure | None, measure: str, sign: str = "") -> str:
    """A figure of the first table; with a ``sign``, a gain, in nats or percentage points."""
    if figure is None:
        return ""
    scale, digits = (1, 4) if measure == LOSS else (100, 1)
    ends = [] if figure.low is None or figure.high is None else [figure.low, figure.high]
    if not sign and measure != LOSS:  # an interval by Student's t may end beyond 0 and 1
        ends = [min(max(end, 0), 1) for end in ends]
    mean, *shown = (f"{scale * x:{sign}.{digits}f}" for x in (figure.mean, *ends))
    unit = "" if sign or measure == LOSS else " %"
    return f"{mean}{unit} ({' to '.join(shown)})" if shown else f"{mean}{unit}"


def draw(gains: dict[str, Gains], path: Path) -> bool:
    """A plot of the gains on held-out text, and of those in the answers over no thoughts; False without matplotlib."""
    if not can_draw():
        return False
    # The gain over the base model is mostly that of more text, on a scale of its own.
    of_text = {name: (name, LOSS) for name in GAINS if name != "over the base model"}
    of_answers = {measure: ("of thinking", measure) for measure in MEASURES if measure != LOSS}
    picture = new_figure(9, 3.5)
    for axes, bars, scale, unit in zip(
        picture.subplots(1, 2), (of_text, of_answers), (1, 100), ("nats per token", "points"), strict=True
    ):
        for number, (arm, found) in enumerate(gains.items()):
            shown = {place + 0.2 * number: found[key] for place, key in enumerate(bars.values()) if key in found}
            ends = [0 if figure.high is None else scale * (figure.high - figure.mean) for figure in shown.values()]
            means = [scale * figure.mean for figure in shown.values()]
            axes.errorbar(means, list(shown), xerr=ends, fmt="o", capsize=3, label=arm)
        axes.set_yticks(range(len(bars)), bars)
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel(f"gain, {unit}")
    legend_below(picture)
    save(picture, path)
    return True


# 6. The command.


def check_settings(e: Experiment) -> None:
    """Save the settings, or refuse to go on with others. Raises ValueError."""
    settings, path = Settings.of(e), e.folder / "settings.json"
    if path.exists():
        settings.check(e.folder, read_json(path, dict[str, Any]))
    e.folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(settings.values, indent=1) + "\n")


@dataclass(frozen=True)
class Command:
    """Train Quiet-STaR and its controls on natural text, and measure what thinking gains."""

    experiment: OmitArgPrefixes[Experiment]
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)
    tiny: Annotated[bool, arg(help="a random model and a few texts instead of these defaults, on a CPU")] = False
    cost: Annotated[bool, arg(help="print what the experiment would cost, and run nothing")] = False


def main(arguments: list[str]) -> int:
    logging.disable_progress_bar()
    tiny = "--tiny" in arguments  # known before the rest is read, since the defaults depend on it
    command = tyro.cli(Command, args=arguments, default=Command(TINY if tiny else Experiment(), tiny=tiny))
    e = with_files(command.experiment) if tiny else command.experiment
    if command.cost:
        print(cost(e, command.machine))
        return 0
    check_settings(e)
    for phase in phases(e):
        if not phase.result.exists():
            print(f"{phase.result}: begun", flush=True)
            began = time.perf_counter()
            found = phase.work()
            seconds = time.perf_counter() - began
            phase.result.parent.mkdir(exist_ok=True)
            write_whole(phase.result, json.dumps({"seconds": seconds, **found}) + "\n")
            print(f"{phase.result}: done, {seconds:.0f} s", flush=True)
    print(write(e))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"natural_text.py: {error}")
