"""STaR: a model learns from those of its own chains that led to the right answer (arXiv 2203.14465).

Each round, the model of the round before writes a chain and an answer to many problems. Those with the right answer are kept.
For the others it may be told the answer, to write a chain towards it (rationalisation); what is kept of these is trained on
under the prompt without the answer. Then a fresh copy of the first model, not the last one, is trained on what was kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from quietstar.recipes.common.evaluation import chains_right, evaluate
from quietstar.recipes.common.log import Pace, tell
from quietstar.recipes.common.models import option
from quietstar.recipes.common.rounds import Rounds
from quietstar.recipes.common.sampling import VLLM, Sampling, likelihoods, rollout
from quietstar.recipes.common.sft import Example, SFTConfig, sft
from quietstar.recipes.tasks import Row, Task
from quietstar.run.batches import mix_seed


@dataclass
class Config(SFTConfig, Sampling):
    """STaR's numbers.

    Raises:
        ValueError: a value outside its range, by name.
    """

    out: str = option("runs/star", "folder of the run")
    rounds: int = option(4, "how often to collect chains and train on them")
    problems: int = option(4000, "training problems to try a round, drawn anew each time")
    steps: int = option(60, "training steps of the first round")
    growth: float = option(1.2, "each round has this many times the steps of the one before")
    sft_steps: int = option(0, "steps on the data's own chains, to begin with")
    hint_share: float = option(0.0, "share of those rows that show the answer, which teaches a small model to use a hint")
    shots: int = option(0, "rows with chains that stand before each prompt of the first model, a few-shot start")
    rationalize: bool = option(False, "tell the answer to problems that were not solved, and keep chains that reach it")
    rationale_check: Literal["no", "chain", "likelihood"] = option(
        "no", "keep such a chain only if it is right, where the task can tell, or if it is likely without the hint"
    )
    least_likelihood: float = option(-0.5, "mean log-probability a token, without the hint, from which on a chain is likely")
    filter: bool = option(True, "keep only what has the right answer; without, a control")
    restart: bool = option(True, "train a fresh copy of the first model each round; without, go on with the last one")
    temperature: float = option(0.0, "of the chains; 0 takes the likeliest token each time")
    engine: Literal["transformers", "vllm"] = option("transformers", "what writes the chains of the training problems")
    test_problems: int = option(500, "test problems to measure the accuracy on")

    def __post_init__(self) -> None:
        for part in (SFTConfig, Sampling):
            part.__post_init__(self)
        for name in ("rounds", "problems", "steps", "test_problems"):
            if getattr(self, name) < 1:
                raise ValueError(f"star: {name} must be 1 or more, got {getattr(self, name)!r}")
        for name in ("sft_steps", "shots"):
            if getattr(self, name) < 0:
                raise ValueError(f"star: {name} must be 0 or more, got {getattr(self, name)!r}")
        if not 0 <= self.hint_share <= 1:
            raise ValueError(f"star: hint_share must be from 0 to 1, got {self.hint_share!r}")
        if not self.growth > 0:
            raise ValueError(f"star: growth must be above 0, got {self.growth!r}")


@dataclass(frozen=True)
class Kept:
    """What a round trains on: a row with a chain that the model wrote, by itself or with the answer as a hint."""

    row: Row
    ids: list[int]
    hinted: bool

    @property
    def example(self) -> Example:
        """Under the prompt without the hint, always."""
        return self.row.prompt_ids, self.ids


def star(
    model: PreTrainedModel, task: Task, config: Config, name: str = "", resume: bool = False
) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """Run all rounds, or those that a stopped run lacks; ``model`` is changed only by the start on the data's own chains.

    Writes round-00 (the first model), round-01, ... and metrics.jsonl into ``config.out``.

    Args:
        name: of the model, which a run that goes on must have begun with.
        resume: go on behind the last whole round of ``config.out``, if there is one.

    Returns:
        The last model, and the figures of the start and each round: problems, kept (by itself), rationalised, failed, the
        shares of right chains among both kinds where the task can tell, steps, accuracy on test problems, seconds.

    Raises:
        ValueError: no example chains where some are asked for, no right answer in the first batch, a round that keeps nothing,
            or a run in ``config.out`` that is another one or that ``resume`` doesn't ask for.
    """
    free = ("out", "rounds", "engine", "batch_size")
    settings = {option: value for option, value in asdict(config).items() if option not in free}
    run = Rounds(config.out, {"recipe": "star", "model": name, "task": task.name} | settings, resume)
    generator = torch.Generator().manual_seed(mix_seed(config.seed, 0))
    test = task.sample(config.test_problems, "test", generator)
    shown = example_rows(task, config.shots, generator)
    if run.done < 0:
        began = time.perf_counter()
        if config.sft_steps:
            start_on_chains(model, task, config, generator)
        prompts = [shots(task, shown) + row.prompt_ids for row in test]
        figures = evaluate(model, task, test, config.max_new, prompts, config.batch_size)
        run.save(0, model, task, {"round": 0, **figures, "seconds": time.perf_counter() - began})
    current = run.model(run.done, model)
    for number in range(run.done + 1, config.rounds + 1):
        began = time.perf_counter()
        kept, counts = collect(current, task, config, number, shown if number == 1 else [], run.folder(number - 1))
        current = run.model(0, model) if config.restart else current
        steps = int(config.steps * config.growth ** (number - 1))
        sft(current, [x.example for x in kept], steps, config, mix_seed(config.seed, number), run.log("star", number))
        figures = evaluate(current, task, test, config.max_new, batch_size=config.batch_size)
        report = {"round": number, **counts, "steps": steps, **figures, "seconds": time.perf_counter() - began}
        rows = [{"prompt": task.text(x.row.prompt_ids), "chain": task.text(x.ids), "hinted": x.hinted} for x in kept]
        run.save(number, current, task, report, kept=rows)
    return current, run.reports()


def start_on_chains(model: PreTrainedModel, task: Task, config: Config, generator: torch.Generator) -> None:
    """A start for models that don't follow examples: supervised training on the data's chains, some with the hint."""
    rows = task.sample_with_chain(config.problems, generator)
    if not rows:
        raise ValueError("star: sft_steps needs problems with chains, and the data have none")
    hinted = torch.rand(len(rows), generator=generator) < config.hint_share
    examples = [
        (row.hinted_ids if hint else row.prompt_ids, task.completion_ids(row))
        for row, hint in zip(rows, hinted.tolist(), strict=True)
    ]
    sft(model, examples, config.sft_steps, config, config.seed)


def example_rows(task: Task, count: int, generator: torch.Generator) -> list[Row]:
    """Training rows with chains, to stand before a prompt."""
    rows = task.sample_with_chain(count, generator) if count else []
    if len(rows) < count:
        raise ValueError(f"star: shots={count} needs as many problems with chains, and the data have {len(rows)}")
    return rows


def shots(task: Task, rows: Sequence[Row], hinted: bool = False) -> list[int]:
    """The rows one after the other, solved."""
    return [x for row in rows for x in (row.hinted_ids if hinted else row.prompt_ids) + task.completion_ids(row)]


def collect(
    model: PreTrainedModel, task: Task, config: Config, number: int, shown: Sequence[Row], folder: Path
) -> tuple[list[Kept], dict[str, Any]]:
    """Chains for a round's problems, and how many were kept.

    Raises:
        ValueError: nothing to keep in the first batch of the first round, or in a whole round.
    """
    rows = task.sample(config.problems, "train", torch.Generator().manual_seed(mix_seed(config.seed, number)))
    writer = VLLM(str(folder)) if config.engine == "vllm" else model
    kept: list[Kept] = []
    pace = Pace()
    for start in range(0, len(rows), config.batch_size):
        if pace.due():
            tell(config.out, {"round": number, "tried": start, "kept": len(kept)})
        batch = rows[start : start + config.batch_size]
        seed = mix_seed(mix_seed(config.seed, number), start)
        written = write(writer, task, config, batch, shown, False, seed)
        solved = [not config.filter or task.check(row, ids) for row, ids in zip(batch, written, strict=True)]
        kept += [Kept(row, ids, False) for row, ids, right in zip(batch, written, solved, strict=True) if right]
        failed = [row for row, right in zip(batch, solved, strict=True) if not right]
        if config.rationalize and failed:
            towards = write(writer, task, config, failed, shown, True, seed)
            right = [(row, ids) for row, ids in zip(failed, towards, strict=True) if task.check(row, ids)]
            kept += [Kept(row, ids, True) for row, ids in sound(model, task, config, right)]
        if not kept and start == 0 and number == 1:
            raise ValueError(f"star: {never(task, batch, written)}")
    if not kept:
        raise ValueError(f"star: round {number} solved none of {len(rows)} problems; the rounds before it are in {config.out}")
    own, hinted = ([(x.row, x.ids) for x in kept if x.hinted == flag] for flag in (False, True))
    return kept, {
        "tried": len(rows),
        "kept": len(own),
        "rationalised": len(hinted),
        "failed": len(rows) - len(kept),
        "kept_chain_right": chains_right(task, own),
        "rationalised_chain_right": chains_right(task, hinted),
    }


def write(
    writer: PreTrainedModel | VLLM,
    task: Task,
    config: Config,
    rows: Sequence[Row],
    shown: Sequence[Row],
    hinted: bool,
    seed: int,
) -> list[list[int]]:
    """A chain and an answer for each row, as one would train on them."""
    before = shots(task, shown, hinted)
    prompts = [before + (row.hinted_ids if hinted else row.prompt_ids) for row in rows]
    return [task.trimmed(x[0].ids) for x in rollout(writer, task, prompts, seed=seed, **config.sampling)]


def sound(
    model: PreTrainedModel, task: Task, config: Config, written: list[tuple[Row, list[int]]]
) -> list[tuple[Row, list[int]]]:
    """Those that ``rationale_check`` lets through: a right answer may be copied from the hint behind a wrong chain."""
    if config.rationale_check == "chain":
        return [(row, ids) for row, ids in written if task.check_chain(row, ids) is not False]
    if config.rationale_check == "likelihood" and written:
        values = likelihoods(model, [row.prompt_ids for row, _ in written], [ids for _, ids in written], config.batch_size)
        return [x for x, value in zip(written, values, strict=True) if value / len(x[1]) >= config.least_likelihood]
    return written


def never(task: Task, rows: Sequence[Row], written: Sequence[list[int]]) -> str:
    """Why there is nothing to learn from: no answer at all, or none that is right."""
    answers = [task.answer(row, ids) for row, ids in zip(rows, written, strict=True)]
    found = sum(answer is not None for answer in answers)
    place = next((i for i, answer in enumerate(answers) if answer is not None), 0)
    return (
        f"none of the first {len(rows)} problems is solved, so there is nothing to learn from: {found} have an answer that can "
        f"be read; where {rows[place].problem.right!r} is right, the model wrote {task.text(written[place])[-80:]!r}"
    )
