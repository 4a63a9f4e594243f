"""Chains of attempts that revise each other, a model that learns to revise, and a verifier of its attempts.

arXiv 2408.03314, section 6 and appendices H to J.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from quietstar.run.batches import mix_seed
from quietstar_recipes.common.sampling import Completion, Sampling, rollout
from quietstar_recipes.common.solutions import VISIBLE_ATTEMPTS, Scorer, revision_prompt, to_samples
from quietstar_recipes.common.training import Example, SFTConfig, sft
from quietstar_recipes.solve.budgets import Chains
from quietstar_recipes.solve.values import Valued, train_values, values
from quietstar_recipes.tasks import Row, Task


def revise(
    model: PreTrainedModel,
    task: Task,
    rows: Sequence[Row],
    until: Sequence[int],
    sampling: Sampling,
    scorer: Scorer | None = None,
    judge: PreTrainedModel | None = None,
) -> Chains:
    """Chains of attempts at each row.

    Args:
        until: length of each of a row's chains.
        scorer: scores an attempt on its own.
        judge: instead of the scorer, a verifier from ``train_chain_verifier``, which sees the earlier attempts.
    """
    owners = [row for row in rows for _ in until]
    chains = write_chains(model, task, owners, [length for _ in rows for length in until], sampling)
    found = to_samples(task, owners, chains, None if judge else scorer)
    if judge:
        attempts = [[task.trimmed(x.ids) for x in chain] for chain in chains]
        prompts, solutions = with_history(task, owners, attempts)
        scores = iter(values(judge, task, prompts, solutions, sampling.batch_size))
        found = [[replace(x, score=next(scores)) for x in chain] for chain in found]
    return [found[start : start + len(until)] for start in range(0, len(found), len(until))]


def write_chains(
    model: PreTrainedModel, task: Task, owners: Sequence[Row], until: Sequence[int], sampling: Sampling
) -> list[list[Completion]]:
    """One chain of each length for the row at its place; an attempt sees the latest four before it."""
    chains: list[list[Completion]] = [[] for _ in owners]
    for number in range(max(until)):
        going = [i for i, length in enumerate(until) if number < length]
        prompts = [revision_prompt(task, owners[i], [task.trimmed(x.ids) for x in chains[i]]) for i in going]
        seed = mix_seed(sampling.seed, 2 + number)
        for i, completions in zip(going, rollout(model, task, prompts, seed=seed, **sampling.sampling), strict=True):
            chains[i] += completions
    return chains


def with_history(task: Task, owners: Sequence[Row], chains: list[list[list[int]]]) -> tuple[list[list[int]], list[list[int]]]:
    """For each attempt of all chains, which are ids, the prompt that it was written after, and its own ids."""
    pairs = [
        (revision_prompt(task, row, chain[:number]), ids)
        for row, chain in zip(owners, chains, strict=True)
        for number, ids in enumerate(chain)
    ]
    return [prompt for prompt, _ in pairs], [ids for _, ids in pairs]


def train_reviser(
    model: PreTrainedModel, task: Task, rows: Sequence[Row], samples: int, steps: int, sft_config: SFTConfig, sampling: Sampling
) -> PreTrainedModel:
    """A copy of the model that has learnt to write a right solution at once, and after attempts of its own.

    Args:
        samples: solutions of each row to learn from; 64 in the paper.
    """
    seed = mix_seed(sampling.seed, -2)
    written = rollout(model, task, [row.prompt_ids for row in rows], samples, seed=seed, **sampling.sampling)
    choose = random.Random(sampling.seed)
    examples = [x for row, solutions in zip(rows, written, strict=True) for x in revisions(task, row, solutions, choose)]
    if not examples:
        raise ValueError(f"solve: none of {len(rows)} training problems has a right solution to learn revisions from")
    return sft(copy.deepcopy(model), examples, steps, sft_config, sampling.seed)


def revisions(task: Task, row: Row, written: Sequence[Completion], choose: random.Random) -> list[Example]:
    """Two examples for every right solution of a row: that solution at once, and after one to four attempts, drawn uniformly.

    The last attempt is, by the toss of a coin, the right solution itself, which is to be kept, or the wrong one nearest to it
    by edit distance between characters, so that the two have something in common; the others are wrong ones drawn at random
    (arXiv 2408.03314, appendix H, whose attempts are all wrong). Solutions without an answer that can be read are left out.
    """
    solutions = [task.trimmed(x.ids) for x in written if task.answer(row, x.ids) is not None]
    wrong = [ids for ids in solutions if not task.check(row, ids)]
    texts = [task.text(ids) for ids in wrong]
    nearest: dict[str, int] = {}  # of the wrong solutions; right ones are often the same
    found = []
    for target in solutions:
        if not task.check(row, target):
            continue
        last, others = target, list(range(len(wrong)))
        if wrong and choose.random() < 0.5:
            text = task.text(target)
            if text not in nearest:
                nearest[text] = min(range(len(wrong)), key=lambda i: edit_distance(texts[i], text))
            last = wrong[nearest[text]]
            others.remove(nearest[text])
        before = choose.sample(others, choose.randint(0, min(VISIBLE_ATTEMPTS - 1, len(others))))
        found += [(row.prompt_ids, target), (revision_prompt(task, row, [*(wrong[i] for i in before), last]), target)]
    return found


def edit_distance(a: str, b: str) -> int:
    """The number of characters to insert, delete or replace to make ``b`` of ``a`` (Levenshtein).

    A column of the usual table is kept as the bits of two numbers, where it grows and where it falls by 1 (Myers, J. ACM 46,
    1999), so that a character of ``b`` takes a few operations on numbers.
    """
    if not a:
        return len(b)
    places: dict[str, int] = {}
    for i, character in enumerate(a):
        places[character] = places.get(character, 0) | 1 << i
    every, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    grows, falls, distance = every, 0, len(a)
    for character in b:
        same = places.get(character, 0)
        diagonal = (((same & grows) + grows) ^ grows) | same | falls
        up, down = falls | ~(diagonal | grows) & every, grows & diagonal
        distance += bool(up & last) - bool(down & last)
        up, down = (up << 1 | 1) & every, down << 1 & every
        grows, falls = down | ~(diagonal | up) & every, up & diagonal
    return distance


def train_chain_verifier(
    reviser: PreTrainedModel,
    start: PreTrainedModel,
    task: Task,
    rows: Sequence[Row],
    attempts: int,
    steps: int,
    sft_config: SFTConfig,
    sampling: Sampling,
) -> PreTrainedModel:
    """A copy of ``start`` that has learnt from chains of the reviser whether an attempt is right, given the earlier ones.

    The paper trains this outcome verifier because one that learnt from the first model's solutions judges revisions less well
    (appendix J).

    Args:
        attempts: in each row's chain.
    """
    elsewhere = mix_seed(sampling.seed, -6)
    chains = write_chains(reviser, task, rows, [attempts] * len(rows), replace(sampling, seed=elsewhere))
    prompts, solutions = with_history(task, rows, [[task.trimmed(x.ids) for x in chain] for chain in chains])
    learnt = [
        Valued(i // attempts, prompt, ids, [len(ids)], [float(task.check(row, ids))])
        for i, (prompt, ids) in enumerate(zip(prompts, solutions, strict=True))
        if task.answer(row := rows[i // attempts], ids) is not None
    ]
    verifier, _ = train_values(start, task, learnt, steps, sft_config, sampling.seed)
    return verifier
