"""Fast Quiet-STaR: shorter and shorter thoughts, then none (arXiv 2505.17746).

A curriculum: the model learns with long thoughts, and each stage continues from the best checkpoint of the one before, with
shorter thoughts. Then a plain language model, which never thinks, is trained against the loss of the thinking one at each token
(``plain``).
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, TypedDict

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quietstar import QuietStar, ThoughtConfig
from quietstar.config import TrainConfig, option
from quietstar.evaluation.losses import evaluate
from quietstar.files.reading import read_json
from quietstar.run.batches import Example, mix_seed
from quietstar.run.lock import alone_in_out
from quietstar.run.resume import Settings, tokens_hash
from quietstar.training import train
from quietstar_kernels.checks import check_at_least, check_positive
from quietstar_recipes.common.log import LOG
from quietstar_recipes.common.plots import Panel, panels
from quietstar_recipes.common.saving import Rounds, fingerprint, write_json
from quietstar_recipes.fast import plain

TEXTS, NEW, TURNS = 4, 16, 3  # of the speed measurement: texts continued at once, most new tokens of each, and repetitions
MODEL, BEST, CHOSEN, NAME = plain.MODEL, "best", "chosen.json", "fast"  # what a run writes; the last is .json and .png


class Chosen(TypedDict):
    """chosen.json: the figures of a stage's best checkpoint, in nats but for the first two and the last."""

    thought_tokens: int
    lookahead: int
    base: float
    mixed: float
    gain: float
    gain_low: float
    gain_high: float
    score: float


@dataclass
class Config(plain.PlainConfig):
    """The options of the curriculum and of the plain model; defaults are those of the published code.

    Its script (huangwei200012/Fast-Quiet-STaR, run_sh/fast_quiet_star_mistral.sh) has the stages 16-8, 12-4 and 8-4. The first
    number of each is ``n_ahead``, which also counts start, end and the text's token, so T is 3 less: 13, 9 and 5.
    """

    curriculum: str = option("13-8,9-4,5-4", "tokens of a thought and of its look-ahead, for each stage")
    learning_rate: float = option(2e-6, "peak learning rate of the first stage")
    later_rate: float = option(0.5, "the peak of later stages is this times as high")
    warmup: int = option(20, "steps of linear warmup in each stage")
    weight_decay: float = option(1e-3, "weight decay of AdamW in the stages")

    def __post_init__(self) -> None:
        super().__post_init__()
        stages(self.curriculum)
        check_at_least("fast", self, 0, ("warmup", "weight_decay"))
        check_positive("fast", self, ("learning_rate", "later_rate"))


def stages(curriculum: str) -> list[tuple[int, int]]:
    """(T, J) of each stage, from text such as "13-8,9-4"; raises ValueError if it can't be read or thoughts grow longer."""
    try:
        pairs = [tuple(int(x) for x in stage.split("-")) for stage in curriculum.replace(" ", "").split(",")]
        found = [(T, J) for T, J in pairs]
    except ValueError:
        found = []
    if not found or min(min(stage) for stage in found) < 1:
        raise ValueError(f"fast: curriculum must be stages like 13-8,9-4,5-4, got {curriculum!r}")
    if any(later[0] > earlier[0] for earlier, later in zip(found, found[1:], strict=False)):
        raise ValueError(f"fast: curriculum must not have thoughts that grow longer, got {curriculum!r}")
    return found


@alone_in_out(Config)
def fast(
    model: PreTrainedModel,
    data: Sequence[Example],
    held_out: Sequence[Example],
    thoughts: ThoughtConfig | None = None,
    config: Config | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    score: Callable[[QuietStar], float] | None = None,
    name: str = "",
    resume: bool = False,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Run the curriculum and train the plain model, or what a stopped run lacks; ``model`` stays as it is.

    Writes stage-1-13-8, ... with the best checkpoint of each stage (best), the plain model as an ordinary checkpoint (model)
    and the report (fast.json and, with matplotlib, fast.png) into ``config.out``.

    Args:
        data: examples, as ``quietstar.train`` takes them.
        held_out: at least two texts, for the losses of the report.
        thoughts: whatever the curriculum does not set: N, objective, embeddings.
        score: of a thinking model, to choose the checkpoint of a stage; higher is better. For instance the accuracy on a task;
            default minus the held-out loss with thoughts.

    Returns:
        The plain model and the report: "base", "start" and "plain", held-out losses without thoughts of the original model and
        of the plain one before and after its training; "stages", what was chosen in each; all in nats per token. And "speeds",
        the cost of thoughts of each length.

    Raises:
        ValueError: no data, or fewer than two held-out texts.
    """
    config, thoughts = config or Config(), thoughts or ThoughtConfig()
    if len(held_out) < 2:
        raise ValueError(f"fast: at least 2 texts must be held out, to choose checkpoints by, got {len(held_out)}")
    inputs = {"the data": tokens_hash([*data, *held_out]), f"the model {name}".rstrip(): fingerprint(model)}
    Rounds(config.out, Settings.of(thoughts, config, recipe="fast", model=name, texts=len(data), inputs=inputs), resume)
    report: dict[str, Any] = {"base": plain.loss(model, held_out, config.batch_size), "stages": []}
    # 1. Each stage goes on from the best checkpoint of the one before, with shorter thoughts.
    qs = QuietStar(copy.deepcopy(model), thoughts, tokenizer)
    for number, (T, J) in enumerate(stages(config.curriculum)):
        qs.use_config(replace(thoughts, thought_tokens=T, lookahead=J))
        folder = Path(config.out) / f"stage-{number + 1}-{T}-{J}"
        report["stages"].append(run_stage(qs, data, held_out, config, folder, number, score))
        qs = QuietStar.from_pretrained(folder / BEST).to(model.device)
    # 2. The plain model learns from the last stage's.
    before = plain.initial(model, qs, config)
    report["start"] = plain.loss(before, held_out, config.batch_size)
    student, report["plain"] = plain.train_plain(copy.deepcopy(before), qs, data, held_out, config)
    # 3. What thoughts cost.
    report["speeds"] = speeds(qs, held_out, [T for T, _ in stages(config.curriculum)])
    write_json(Path(config.out) / f"{NAME}.json", report)
    plot(Path(config.out) / f"{NAME}.png", report, f"{len(held_out)} held-out texts")
    return student, report


def run_stage(
    qs: QuietStar,
    data: Sequence[Example],
    held_out: Sequence[Example],
    config: Config,
    folder: Path,
    number: int,
    score: Callable[[QuietStar], float] | None,
) -> dict[str, Any]:
    """Run one stage and keep its best checkpoint in ``folder``/best; returns the figures of that checkpoint."""
    chosen = read_json(folder / CHOSEN, Chosen) if (folder / CHOSEN).exists() else None

    def choose(qs: QuietStar) -> dict[str, float]:
        nonlocal chosen
        figures = evaluate(qs, held_out, config.batch_size, controls=False)
        figures["score"] = score(qs) if score else -figures["mixed"]
        if chosen is None or figures["score"] > chosen["score"]:
            size = {"thought_tokens": qs.thought_config.thought_tokens, "lookahead": qs.thought_config.lookahead}
            chosen = size | {name: figures[name] for name in ("base", "mixed", "gain", "gain_low", "gain_high", "score")}
            qs.save_pretrained(folder / BEST)
            write_json(folder / CHOSEN, chosen)
        return figures

    rate = config.learning_rate * (config.later_rate if number else 1)
    same = ("steps", "batch_size", "warmup", "weight_decay", "eval_every", "save_every")
    shared: dict[str, Any] = {name: getattr(config, name) for name in same}
    seed = mix_seed(config.seed, number) % 2**32
    settings = TrainConfig(out=str(folder), learning_rate=rate, seed=seed, keep=1, **shared)
    train(qs, data, settings, evaluate=choose, resume="auto", progress=LOG.isEnabledFor(logging.INFO))
    assert chosen is not None  # the last step evaluates
    return chosen


def speeds(qs: QuietStar, texts: Sequence[Example], lengths: Sequence[int]) -> list[dict[str, float]]:
    """Seconds per generated token with thoughts of each of these lengths, and without thoughts (0).

    All lengths continue the same texts in turn, with the same weights, so only the length affects the speed. The figure to look
    at is times_plain, the ratio to the time without thoughts, a median over the turns.
    """
    some = [texts[i] for i in range(min(TEXTS, len(texts)))]
    kept = [x["input_ids"][: int(x["attention_mask"].sum()) if "attention_mask" in x else None] for x in some]
    shortest = min(map(len, kept))
    ids = torch.stack([x[: shortest // 2] for x in kept]).to(qs.start_embedding.device)
    new = min(NEW, shortest - shortest // 2)  # no longer than the texts, which fit together with their thoughts
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    trained_with = qs.thought_config
    seconds: dict[int, list[float]] = {T: [] for T in [*lengths, 0]}
    for turn in range(TURNS + 1):
        for T, found in seconds.items():
            qs.use_config(replace(trained_with, thought_tokens=T or 1))
            began = time.perf_counter()
            qs.generate(ids, torch.ones_like(ids), max_new_tokens=new, think="always" if T else "never", **options).tolist()
            if turn:  # the first turn warms up
                found.append((time.perf_counter() - began) / (len(ids) * new))
    qs.use_config(trained_with)
    ratios = {T: [a / b for a, b in zip(found, seconds[0], strict=True)] for T, found in seconds.items()}
    return [
        {"thought_tokens": T, "seconds_per_token": median(found), "times_plain": median(ratios[T])}
        for T, found in seconds.items()
    ]


def plot(path: Path, report: Mapping[str, Any], title: str) -> None:
    """Plot a run's report."""
    times = {x["thought_tokens"]: x["times_plain"] for x in report["speeds"]}
    stages = [(stage["thought_tokens"], stage["mixed"]) for stage in report["stages"]]
    cost = {"curriculum": [[(times[T], loss) for T, loss in stages]]}
    tokens = {"curriculum": [stages]}
    for name in ("base", "plain"):
        cost[name], tokens[name] = [[(times[0], report[name])]], [[(0, report[name])]]
    drawn = [
        Panel("seconds per token, relative to no thoughts", "held-out loss, nats", cost),
        Panel("tokens per thought", "held-out loss, nats", tokens),
    ]
    panels(path, title, drawn)
