"""Fast Quiet-STaR: shorter and shorter thoughts, then none (arXiv 2505.17746).

A curriculum: the model learns with long thoughts, and each stage continues from the best checkpoint of the one before, with
shorter thoughts. Then a plain language model, which never thinks, is trained against the loss of the thinking one at each token
(``fast_plain``).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quietstar import QuietStar, ThoughtConfig
from quietstar.arguments.fields import check_at_least, check_positive
from quietstar.config import TrainConfig, option
from quietstar.evaluation.losses import evaluate
from quietstar.files.writing import write_whole
from quietstar.recipes import fast_plain as plain
from quietstar.recipes import fast_report
from quietstar.recipes.common.log import is_logging
from quietstar.recipes.common.progress import Count
from quietstar.recipes.common.rounds import Rounds, read_report
from quietstar.run.batches import Example, mix_seed
from quietstar.run.lock import alone_in_out
from quietstar.run.resume import Settings
from quietstar.train import train

__all__ = ["Config", "fast"]

MODEL, BEST, CHOSEN, NAME = plain.MODEL, "best", "chosen.json", "fast"  # what a run writes; the last is .json and .png


class Chosen(msgspec.Struct):
    """chosen.json: the figures of a stage's best checkpoint, in nats but for the first two and the last."""

    thought_tokens: Count
    lookahead: Count
    base: float
    mixed: float
    gain: float
    gain_low: float
    gain_high: float
    score: float


@dataclass
class Config(plain.Config):
    """The options of the curriculum and of the plain model; defaults are those of the published code.

    Its script (huangwei200012/Fast-Quiet-STaR, run_sh/fast_quiet_star_mistral.sh) has the stages 16-8, 12-4 and 8-4. The first
    number of each is ``n_ahead``, which also counts start, end and the text's token, so T is 3 less: 13, 9 and 5.

    Raises:
        ValueError: a value outside its range, by name.
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
    and the report (fast.json and, with matplotlib, fast.png) into ``config.out``. SIGTERM and Ctrl-C finish the current step
    and save.

    Args:
        data: examples, as ``quietstar.train.train`` takes them.
        held_out: at least two texts, for the losses of the report.
        thoughts: whatever the curriculum does not set: N, objective, embeddings.
        score: of a thinking model, to choose the checkpoint of a stage; higher is better. For instance the accuracy on a task;
            default minus the held-out loss with thoughts.
        name: the model's name; a resumed run must have started with the same one.
        resume: continue the run in ``config.out``, if there is one.

    Returns:
        The plain model and the report: "base", "start" and "plain", held-out losses without thoughts of the original model and
        of the plain one before and after its training; "stages", what was chosen in each; "positions", where thoughts help and
        what is rewarded; all in nats per token. And "speeds", the cost of thoughts of each length.

    Raises:
        ValueError: no data, fewer than two held-out texts, or a run in ``config.out`` that has other settings or was not to be
            resumed.
        Interrupted: after a signal, once everything is saved.
    """
    config, thoughts = config or Config(), thoughts or ThoughtConfig()
    if len(held_out) < 2:
        raise ValueError(f"fast: at least 2 texts must be held out, to choose checkpoints by, got {len(held_out)}")
    Rounds(config.out, Settings.of(thoughts, config, recipe="fast", model=name, texts=len(data)), resume)
    report: dict[str, Any] = {"base": plain.loss(model, held_out, config.batch_size), "stages": []}
    qs = QuietStar(copy.deepcopy(model), thoughts, tokenizer)
    for number, (T, J) in enumerate(stages(config.curriculum)):
        qs.use_config(replace(thoughts, thought_tokens=T, lookahead=J))
        folder = Path(config.out) / f"stage-{number + 1}-{T}-{J}"
        report["stages"].append(run_stage(qs, data, held_out, config, folder, number, score))
        qs = QuietStar.from_pretrained(folder / BEST).to(model.device)
    before = plain.initial(model, qs, config)
    report["start"] = plain.loss(before, held_out, config.batch_size)
    student, report["plain"] = plain.train(copy.deepcopy(before), qs, data, held_out, config)
    report["positions"] = fast_report.by_position(before, student, qs, held_out, config)
    report["speeds"] = fast_report.speeds(qs, held_out, [T for T, _ in stages(config.curriculum)])
    write_whole(Path(config.out) / f"{NAME}.json", json.dumps(report, indent=2) + "\n")
    fast_report.plot(Path(config.out) / f"{NAME}.png", report, f"{len(held_out)} held-out texts")
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
    chosen = read_report(folder / CHOSEN, Chosen) if (folder / CHOSEN).exists() else None

    def choose(qs: QuietStar) -> dict[str, float]:
        nonlocal chosen
        figures = evaluate(qs, held_out, config.batch_size, controls=False)
        figures["score"] = score(qs) if score else -figures["mixed"]
        if chosen is None or figures["score"] > chosen["score"]:
            size = {"thought_tokens": qs.thought_config.thought_tokens, "lookahead": qs.thought_config.lookahead}
            chosen = size | {name: figures[name] for name in ("base", "mixed", "gain", "gain_low", "gain_high", "score")}
            qs.save_pretrained(folder / BEST)
            write_whole(folder / CHOSEN, json.dumps(chosen, indent=2) + "\n")
        return figures

    rate = config.learning_rate * (config.later_rate if number else 1)
    settings = TrainConfig(
        out=str(folder),
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=rate,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        seed=mix_seed(config.seed, number) % 2**32,
        eval_every=config.eval_every,
        save_every=config.save_every,
        keep=1,
    )
    train(qs, data, settings, evaluate=choose, resume="auto", progress=is_logging())
    assert chosen is not None  # the last step evaluates
    return chosen
