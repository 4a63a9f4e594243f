"""STaR: a model learns from those of its own chains that led to the right answer (arXiv 2203.14465).

In each round, the model of the round before writes a chain and an answer to many problems, and those with the right answer are
kept. For the others it may be given the answer and asked for a chain that leads to it (rationalisation); what is kept of these
is trained on with the prompt that lacks the answer. Then a fresh copy of the first model, not the latest one, is trained on
what was kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from quietstar.config import option
from quietstar.run.batches import mix_seed
from quietstar.run.lock import alone_in_out
from quietstar.run.resume import Settings
from quietstar_kernels.checks import check, check_at_least, check_positive, check_types
from quietstar_recipes.common.evaluation import measure, nothing_solved, share_of_right_chains
from quietstar_recipes.common.log import batches_of_round
from quietstar_recipes.common.logprobs import likelihoods
from quietstar_recipes.common.sampling import Sampling, rollout
from quietstar_recipes.common.saving import Rounds, hashes, load_model
from quietstar_recipes.common.training import Example, SFTConfig, rows_with_chains, sft
from quietstar_recipes.tasks import Row, Task

LIKELY = -0.5  # mean log-probability of a chain's tokens without the hint, from which on it counts as likely


@dataclass
class Config(SFTConfig, Sampling):
    """The options of STaR."""

    out: str = option("runs/star", "folder of the run", may_differ=True)
    rounds: int = option(4, "how often to collect chains and train on them", may_differ=True)
    problems: int = option(4000, "training problems to try in each round, drawn anew each time")
    steps: int = option(40, "training steps of the first round")
    growth: float = option(1.2, "each round trains this many times as long as the one before")
    sft_steps: int = option(0, "steps of supervised training on the data's own chains, before the first round")
    warmup: int = option(100, "steps of linear warmup in each round")
    shots: int = option(
        0, "examples with chains before each prompt, for a model that was not trained on chains; they are never trained on"
    )
    rationalize: bool = option(False, "retry unsolved problems with the answer as a hint, and keep chains that reach it")
    rationale_check: Literal["no", "chain", "likelihood"] = option(
        "no", "keep such a chain only if it is right, where the task can check that, or if it is likely without the hint"
    )
    hint_rehearsal: float = option(
        0.0, "share of the kept chains to train on a second time with the hint, or a small model forgets how to use one"
    )
    filter: bool = option(True, "keep only solutions with the right answer; off is a control")
    restart: bool = option(True, "train a fresh copy of the first model each round; off continues with the latest one")
    temperature: float = option(0.0, "sampling temperature of the chains; 0 is greedy")
    test_problems: int = option(500, "test problems for the accuracy")
    valid_problems: int = option(400, "validation problems, by which the best round is chosen")

    def __post_init__(self) -> None:
        check_types("star", self)
        for part in (SFTConfig, Sampling):
            part.__post_init__(self)
        check_at_least("star", self, 1, ("rounds", "problems", "steps", "test_problems", "valid_problems"))
        check_at_least("star", self, 0, ("sft_steps", "shots"))
        check("star", self, "hint_rehearsal", 0 <= self.hint_rehearsal <= 1, "from 0 to 1")
        check_positive("star", self, ("growth",))


@dataclass(frozen=True)
class KeptChain:
    """A chain to train on: the model wrote it, with or without the answer as a hint."""

    row: Row
    ids: list[int]
    hinted: bool


@alone_in_out(Config)
def star(
    model: PreTrainedModel, task: Task, config: Config, name: str = "", resume: bool = False
) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """Run all rounds, or those that a stopped run lacks.

    Writes round-00 (the first model), round-01, ... and metrics.jsonl into ``config.out``, where the link best leads to the
    round with the highest accuracy on validation problems. ``model`` is changed only by ``config.sft_steps`` of training on the
    data's own chains.

    Returns:
        The last model, and the figures of the start and of each round: problems, kept (without a hint), rationalised, failed,
        the shares of right chains among both kinds where the task can check chains, steps, accuracy on test problems,
        valid_accuracy, seconds.

    Raises:
        ValueError: too few chains in the data for ``shots`` or ``sft_steps``, no right answer in the first batch, or a round
            that keeps nothing.
    """
    # 1. The problems to measure on, and those to show.
    run = Rounds(config.out, Settings.of(config, recipe="star", model=name, task=task.name, inputs=hashes(task)), resume)
    generator = torch.Generator().manual_seed(mix_seed(config.seed, 0))
    test = task.sample(config.test_problems, "test", generator)
    valid = task.sample(config.valid_problems, "valid", torch.Generator().manual_seed(mix_seed(config.seed, -1)))
    few_shot = example_rows(task, config.shots, generator)
    measured = partial(measure, task=task, test=test, valid=valid, config=config, before=few_shot_ids(task, few_shot))

    # 2. The start.
    if run.done < 0:
        began = time.perf_counter()
        if config.sft_steps:
            taught = rows_with_chains(task, config.problems, generator, "star")
            sft(model, [(row.prompt_ids, task.completion_ids(row)) for row in taught], config.sft_steps, config, config.seed)
        run.save(0, model, task, {"round": 0, **measured(model), "seconds": time.perf_counter() - began})
    # 3. Each round collects chains by the model before it, and trains on them the first model, or the latest one.
    current = load_model(run.folder(run.done), model)
    for number in range(run.done + 1, config.rounds + 1):
        began = time.perf_counter()
        kept, counts = collect(current, task, config, number, few_shot)
        current = load_model(run.folder(0), model) if config.restart else current
        steps = int(config.steps * config.growth ** (number - 1))
        examples = training_examples(kept, config, number)
        sft(current, examples, steps, config, mix_seed(config.seed, number), run.log("star", number))
        figures = measured(current)
        report = {"round": number, **counts, "steps": steps, **figures, "seconds": time.perf_counter() - began}
        rows = [{"prompt": task.text(x.row.prompt_ids), "chain": task.text(x.ids), "hinted": x.hinted} for x in kept]
        run.save(number, current, task, report, kept=rows)
    return current, run.reports()


def example_rows(task: Task, count: int, generator: torch.Generator) -> list[Row]:
    """Training rows with chains, to put before a prompt."""
    rows = task.sample_with_chain(count, generator) if count else []
    if len(rows) < count:
        raise ValueError(f"star: shots={count} needs as many problems with chains, but the data have {len(rows)}")
    return rows


def few_shot_ids(task: Task, rows: Sequence[Row], hinted: bool = False) -> list[int]:
    """The solved rows, one after the other, as ids."""
    return [x for row in rows for x in (row.hinted_ids if hinted else row.prompt_ids) + task.completion_ids(row)]


def collect(
    model: PreTrainedModel, task: Task, config: Config, number: int, shown: Sequence[Row]
) -> tuple[list[KeptChain], dict[str, Any]]:
    """Chains for the problems of a round, and counts of what was kept."""
    rows = task.sample(config.problems, "train", torch.Generator().manual_seed(mix_seed(config.seed, number)))
    kept: list[KeptChain] = []
    for start, batch in batches_of_round(rows, config, number, kept.__len__):
        seed = mix_seed(mix_seed(config.seed, number), start)
        written = write(model, task, config, batch, shown, False, seed)
        solved = [not config.filter or task.check(row, ids) for row, ids in zip(batch, written, strict=True)]
        kept += [KeptChain(row, ids, False) for row, ids, right in zip(batch, written, solved, strict=True) if right]
        failed = [row for row, right in zip(batch, solved, strict=True) if not right]
        if config.rationalize and failed:
            rationales = write(model, task, config, failed, shown, True, seed)
            right = [(row, ids) for row, ids in zip(failed, rationales, strict=True) if task.check(row, ids)]
            kept += [KeptChain(row, ids, True) for row, ids in checked_rationales(model, task, config, right)]
        if not kept and start == 0 and number == 1:
            raise ValueError(f"star: {nothing_solved(task, batch, written)}")
    if not kept:
        raise ValueError(f"star: round {number} solved none of {len(rows)} problems; the rounds before it are in {config.out}")
    own, hinted = ([(x.row, x.ids) for x in kept if x.hinted == flag] for flag in (False, True))
    return kept, {
        **{"tried": len(rows), "kept": len(own), "rationalised": len(hinted), "failed": len(rows) - len(kept)},
        "kept_chain_right": share_of_right_chains(task, own),
        "rationalised_chain_right": share_of_right_chains(task, hinted),
    }


def write(
    model: PreTrainedModel,
    task: Task,
    config: Config,
    rows: Sequence[Row],
    shown: Sequence[Row],
    hinted: bool,
    seed: int,
) -> list[list[int]]:
    """A chain and an answer for each row, in the form to train on."""
    before = few_shot_ids(task, shown, hinted)
    prompts = [before + (row.hinted_ids if hinted else row.prompt_ids) for row in rows]
    return [task.trimmed(x[0].ids) for x in rollout(model, task, prompts, seed=seed, **config.sampling)]


def training_examples(kept: Sequence[KeptChain], config: Config, number: int) -> list[Example]:
    """The kept chains after prompts without the hint, then ``config.hint_rehearsal`` of them again after prompts with it."""
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(mix_seed(mix_seed(config.seed, number), -1)))
    again = [kept[i] for i in order[: round(config.hint_rehearsal * len(kept))].tolist()]
    return [(x.row.prompt_ids, x.ids) for x in kept] + [(x.row.hinted_ids, x.ids) for x in again]


def checked_rationales(
    model: PreTrainedModel, task: Task, config: Config, written: list[tuple[Row, list[int]]]
) -> list[tuple[Row, list[int]]]:
    """The rationales that pass ``config.rationale_check``.

    A right answer may be copied from the hint after a wrong chain.
    """
    if config.rationale_check == "chain":
        return [(row, ids) for row, ids in written if task.check_chain(row, ids) is not False]
    if config.rationale_check == "likelihood" and written:
        values = likelihoods(model, [row.prompt_ids for row, _ in written], [ids for _, ids in written], config.batch_size)
        return [x for x, value in zip(written, values, strict=True) if value / len(x[1]) >= LIKELY]
    return written
