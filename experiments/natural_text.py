"""Does thinking help on natural text? Quiet-STaR on mathematical web pages, against its controls, as one command.

    python experiments/natural_text.py           the same line continues a run that was stopped
    python experiments/natural_text.py --help    for other models, data, arms and sizes

A language model is trained on the same texts in several ways, its arms: without thoughts (plain), and with Quiet-STaR. Each is
measured on held-out texts, with its own thoughts, another text's, one constant thought and random tokens, and on the questions
of GSM8K and CommonsenseQA, by the published probability of the right answer and by exact match. Every phase leaves a JSON file
in the folder and is skipped when that is there; training resumes from its last checkpoint. docs/results.md says what which
result would mean.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import tyro  # noqa: E402
from experiments_report import markdown  # noqa: E402, from this folder
from phases import Phase  # noqa: E402
from transformers.utils import logging  # noqa: E402
from tyro.conf import arg  # noqa: E402

from quietstar import QuietStar, ThoughtConfig  # noqa: E402
from quietstar.checkpoints.pretrained import load_tokenizer  # noqa: E402
from quietstar.cli.common import load_checkpoint, load_model  # noqa: E402
from quietstar.cli.entry import versions  # noqa: E402
from quietstar.cli.main import main as quietstar  # noqa: E402
from quietstar.config import MAY_DIFFER, TrainConfig  # noqa: E402
from quietstar.data.sources import hub_rows  # noqa: E402
from quietstar.data.texts import DataConfig, load_data  # noqa: E402
from quietstar.data.texts import read_texts as texts_of  # noqa: E402
from quietstar.evaluation.intervals import mean_interval  # noqa: E402
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
from quietstar.files.reading import json_lines, read_json  # noqa: E402
from quietstar.files.writing import write_whole  # noqa: E402
from quietstar.run.batches import Example  # noqa: E402
from quietstar.run.resume import Settings  # noqa: E402
from quietstar_kernels.checks import check, check_positive  # noqa: E402

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
        check_positive("Experiment", self, [each.name for each in fields(self) if type(each.default) in (int, float)])
        check("Experiment", self, "arms", len(set(self.arms)) == len(self.arms), "different")
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


# 2. The phases, in their order.


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


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
    ways = with_each_thought(qs, texts, batch_size)
    found = {way: token_losses(qs, examples, batch_size, controls=False) for way, examples in ways.items()}
    without = {"base": of_each_text(found["own"], found["own"].base)}
    return without | {way: of_each_text(losses, losses.mixed) for way, losses in found.items()}


def with_each_thought(qs: QuietStar, texts: Sequence[Example], batch_size: int) -> dict[str, Sequence[Example]]:
    """The texts with their own thoughts, another text's, one constant thought, and random tokens."""
    own = with_own_thoughts(qs, texts, batch_size)
    return {
        "own": own,
        "another": with_thoughts_of_another(own),
        "constant": with_constant_thoughts(own),
        "random": with_random_thoughts(own, qs.lm_head.linear.out_features),
    }


def of_each_text(losses: TokenLosses, values: Any) -> list[float]:
    return (losses.text.bincount(values) / losses.text.bincount()).tolist()


def answer(e: Experiment, name: str, thinks: bool, task: str, start: int) -> dict[str, Any]:
    """One block of questions with its answers: under base without thoughts, under thinking with them."""
    questions = read_questions(str(e.folder / f"{task}.jsonl"))[start : start + e.block]
    tokens = getattr(e, f"{task}_tokens")
    asking = Asking("always" if thinks else "never", max_new_tokens=tokens, batch_size=e.eval_batch)
    return {"questions": ask(model(e, name), questions, asking).to_dict()["questions"]}


# 3. The page: every arm on every measure, and what thinking gains over each of its controls.

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
# Each gain of an arm that thinks: of the first over the second. Thinking is mixing and content together.
GAINS = {
    "of thinking": (OWN, WITHOUT),
    "of mixing": (ANOTHER, WITHOUT),
    "of content": (OWN, ANOTHER),
    "over one constant thought": (OWN, CONSTANT),
    "over random tokens": (OWN, RANDOM),
    "over training without thoughts": (OWN, PLAIN),
    "over the base model": (OWN, START),
}


def write(e: Experiment) -> str:
    """Write report.md and results.json; returns the page."""
    rows = collect(e)
    tables = {"": {name: {measure: figure(scores) for measure, scores in row.items()} for name, row in rows.items()}}
    tables |= {arm: gains_of(rows, arm) for arm in e.arms if arm != "plain"}
    values = {"versions": versions(), "rows": tables[""], "gains": {arm: table for arm, table in tables.items() if arm}}
    write_whole(e.folder / "results.json", json.dumps(values, indent=1) + "\n")
    data = read_json(e.folder / "data.json", dict[str, Any])
    asked = " and ".join(f"{data[task]:,} questions of {title}" for task, title in TASKS.items())
    blocks = [
        "# Quiet-STaR on natural text",
        f"Model `{e.model}`, text `{e.data}`. Each arm is trained {e.seeds} times on {e.steps * e.batch_size * e.length:,} "
        f"tokens in {e.steps:,} steps. {data['held_out']:,} held-out texts, {asked}, zero-shot. Means over seeds, with 95 % "
        f"intervals over texts or questions, which don't hold what seeds differ by; results.json has each seed's. "
        f"Made with {versions()}.",
        "\n".join(f"- {name}: {what}" for name, what in MEASURES.items()),
    ]
    for arm, table in tables.items():
        blocks += [f"## What thinking gains: {arm}"] if arm else []
        lines = [[name, *(cell(row.get(measure), "+" if arm else "") for measure in MEASURES)] for name, row in table.items()]
        blocks.append(markdown(["", *MEASURES], lines))
    page = "\n\n".join(blocks) + "\n"
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


def gains_of(rows: dict[str, dict[str, Scores]], arm: str) -> dict[str, dict[str, dict[str, Any]]]:
    """What an arm gains, text by text, where both sides were measured: a figure by name and measure."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, (first, second) in GAINS.items():
        one, other = rows[f"{arm}, {first}"], rows.get(second) or rows.get(f"{arm}, {second}", {})
        for measure in [measure for measure in one if measure in other]:
            sign = -1 if measure == LOSS else 1  # a smaller loss is better
            theirs = other[measure] * (len(one[measure]) if len(other[measure]) == 1 else 1)  # the base model has one seed
            pairs = [zip(*seeds, strict=True) for seeds in zip(one[measure], theirs, strict=True)]
            found.setdefault(name, {})[measure] = figure([[sign * (x - y) for x, y in seed] for seed in pairs])
    return found


def figure(scores: Scores) -> dict[str, Any]:
    """A mean over texts or questions of the mean over seeds, with its 95 % interval over texts or questions."""
    mean, low, high = mean_interval([fmean(unit) for unit in zip(*scores, strict=True)])
    return {"mean": mean, "low": low, "high": high, "seeds": [fmean(seed) for seed in scores]}


def cell(figure: dict[str, Any] | None, sign: str) -> str:
    """A figure of a table, with its interval."""
    if figure is None:
        return ""
    mean, *ends = (f"{x:{sign}.4f}" for x in (figure["mean"], figure["low"], figure["high"]) if x is not None)
    return f"{mean} ({' to '.join(ends)})" if ends else mean


def main(arguments: list[str]) -> int:
    """Train Quiet-STaR and its controls on natural text, and measure what thinking gains."""
    logging.disable_progress_bar()
    e = tyro.cli(Experiment, args=arguments, description=main.__doc__)
    settings, path = Settings.of(e), e.folder / "settings.json"
    if path.exists():
        settings.check(e.folder, read_json(path, dict[str, Any]))
    e.folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(settings.values, indent=1) + "\n")
    for phase in phases(e):
        phase.run()
    print(write(e))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"natural_text.py: {error}")
