"""Beam search and look-ahead search over the steps of solutions, led by a process verifier (arXiv 2408.03314, section 5.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from transformers import PreTrainedModel

from quietstar.run.batches import mix_seed
from quietstar_recipes.common.branches import Ids
from quietstar_recipes.common.sampling import Completion, Sampling, rollout
from quietstar_recipes.common.selectors import Sample
from quietstar_recipes.common.solutions import to_samples
from quietstar_recipes.tasks import Row, Task

ROUNDS = 40  # steps of a solution at most, as in the paper
# From prompts and solutions that have begun to the log-probability that each ends right.
Value = Callable[[Ids, Ids], list[float]]


@dataclass(frozen=True)
class Found:
    """What a search found for one problem.

    Attributes:
        samples: the solutions that it ended with, with their values as scores, to choose from by ``selectors.weighted``.
        tokens: generated in the whole search, those of abandoned solutions and of looks ahead included.
    """

    samples: list[Sample]
    tokens: int


@dataclass
class Beam:
    """A solution that has begun."""

    owner: int  # number of its problem
    ids: list[int] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)
    whole: bool = False  # whether it is finished
    value: float = 0.0  # the verifier's, of the solution or of where a look ahead from it ended


def search(
    model: PreTrainedModel,
    task: Task,
    rows: Sequence[Row],
    value: Value,
    beams: int,
    width: int,
    sampling: Sampling,
    lookahead: int = 0,
) -> list[Found]:
    """Search a solution of each row, step by step.

    In each round, every problem's ``beams`` candidates write a step, those with the highest values stay, one in ``width`` of
    them, and ``width`` copies of each go on. Candidates that are whole are put aside, and their problem goes on with fewer.

    Args:
        beams: N, candidates of each problem.
        width: M, copies of each candidate that stays; with ``beams`` copies only the best one stays.
        lookahead: k, steps that a candidate goes on greedily before it is valued; 0 is beam search.
    """
    if beams % width:
        raise ValueError(f"search: width must divide beams={beams}, got {width}")
    open_beams = [Beam(owner) for owner in range(len(rows)) for _ in range(beams)]
    done: list[list[Beam]] = [[] for _ in rows]
    tokens = [0] * len(rows)
    prompts = [row.prompt_ids for row in rows]

    def write(begun: Sequence[Beam], seed: int, **options: Any) -> list[Beam]:
        """The same, each a step longer, and whole at its end-of-text token or at ``max_new`` tokens."""
        longest = sampling.max_new - min(len(x.ids) for x in begun)
        options = {**sampling.sampling, "max_new": longest, "ends": task.step_ids, **options}
        steps = rollout(model, task, [prompts[x.owner] + x.ids for x in begun], seed=seed, **options)
        longer = []
        for x, [step] in zip(begun, steps, strict=True):
            tokens[x.owner] += len(step.ids)
            ids = (x.ids + step.ids)[: sampling.max_new]
            whole = len(ids) == sampling.max_new or step.ids[-1] not in task.step_ids
            longer.append(replace(x, ids=ids, logprob=(x.logprob + step.logprob)[: sampling.max_new], whole=whole))
        return longer

    for number in range(ROUNDS):
        # 1. Each candidate writes a step, and is valued there or some greedy steps ahead.
        candidates = write(open_beams, mix_seed(sampling.seed, number))
        ahead = list(candidates)
        for _ in range(lookahead):
            going = [i for i, x in enumerate(ahead) if not x.whole]
            for i, x in zip(going, write([ahead[i] for i in going], 0, temperature=0) if going else [], strict=True):
                ahead[i] = x
        found = value([prompts[x.owner] for x in ahead], [x.ids for x in ahead])
        candidates = [replace(x, value=y) for x, y in zip(candidates, found, strict=True)]
        # 2. Of each problem the best go on, in several copies, and whole ones are put aside.
        open_beams = []
        for owner, several in groupby(candidates, key=lambda x: x.owner):
            of_problem = list(several)
            done[owner] += [x for x in of_problem if x.whole]
            going_on = sorted((x for x in of_problem if not x.whole), key=lambda x: -x.value)
            room = beams - len(done[owner])
            stay = going_on[: -(-room // width)]
            open_beams += [x for x in stay for _ in range(width)][:room]
        if not open_beams:
            break
    for x in open_beams:  # after the last round
        done[x.owner].append(x)
    flat = [[Completion(x.ids, x.logprob) for x in of_problem] for of_problem in done]
    samples = to_samples(task, rows, flat)
    return [
        Found([replace(x, score=beam.value) for x, beam in zip(*pair, strict=True)], spent)
        for *pair, spent in zip(samples, done, tokens, strict=True)
    ]
