"""What pretrained.py measures of a model that thinks: its answers without a thought, with its own and with control thoughts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from natural_text import held_out_losses, with_each_thought
from pretrained_problems import Problem, line
from torch import Tensor

from quietstar import QuietStar
from quietstar.evaluation.scoring import one_thought
from quietstar.run.batches import Example, batches_of

CHAIN = re.compile(r"\d+[+-]\d+=\d+, \d+[+-]\d+=\d+\)")  # a chain that is written out, right or wrong
EVAL_BATCH = 32
NEW_TOKENS = 24  # of a chain with its answer


def answers(qs: QuietStar, tokenizer: Any, some: Sequence[Problem], thinks: bool) -> dict[str, Any]:
    """By the thoughts before the answer, for each problem: -log p of the answer, nats, and whether each token is the likeliest.

    Returns:
        none, own, another, constant and random: nats and right; of own also weight [problems], and thoughts, as text. For a
        model that doesn't think, none alone.
    """
    qs.eval()
    if not thinks:
        nothing = torch.zeros(1, 1, qs.thought_config.thought_tokens, dtype=torch.long)
        return {"none": predict(qs, [line(tokenizer, problem) | {"thought_ids": nothing} for problem in some])[0]}
    ways = with_each_thought(qs, [line(tokenizer, problem) for problem in some], EVAL_BATCH)
    found: dict[str, Any] = {}
    for way, examples in ways.items():
        without, mixed, weight = predict(qs, examples)
        found[way] = mixed
        if way == "own":
            found |= {"none": without, "weight": weight}
    found["thoughts"] = tokenizer.batch_decode([x["thought_ids"][0, 0] for x in ways["own"]])
    return found


@torch.no_grad()
def predict(qs: QuietStar, examples: Sequence[Example]) -> tuple[dict[str, list], dict[str, list], list[float]]:
    """Of the answer: -log p and whether all tokens are the likeliest, without and with the thought; the mean weight of that."""
    J = qs.thought_config.lookahead
    thinker = qs.with_config(replace(one_thought(qs).thought_config, lookahead=J)).thinker
    parts: list[tuple[Tensor, ...]] = []
    for _, batch in batches_of(examples, EVAL_BATCH, qs.start_embedding.device):
        ids, anchors, thoughts = batch["input_ids"], batch["anchors"], batch["thought_ids"]
        layout = thinker.layout(ids, batch["attention_mask"], anchors)
        text, thought = thinker.states(layout, ids, thoughts)
        h_base, h_thought = thinker.base_states(layout, text)[:, 0], thinker.end_states(thought, None)[:, 0, 0]
        # Without the space before the answer: where to put an aside is not what is asked.
        h_base, h_thought = h_base[:, 1:], h_thought[:, 1:]
        targets = ids.gather(1, anchors + torch.arange(2, J + 1, device=ids.device))
        scored = [_score(p, targets) for p in (thinker.logprobs(h_base), thinker.mixed_logprobs(h_base, h_thought))]
        parts.append((*scored[0], *scored[1], thinker.mix(h_base, h_thought).weight.mean(1)))
    nats, right, mixed_nats, mixed_right, weight = (torch.cat(column).tolist() for column in zip(*parts, strict=True))
    return {"nats": nats, "right": right}, {"nats": mixed_nats, "right": mixed_right}, weight


def _score(logprobs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-log p [problems] of the targets [problems,J-1], and whether each of them is the likeliest token."""
    nats = -logprobs.gather(2, targets[..., None])[..., 0].sum(1)
    return nats, (logprobs.argmax(-1) == targets).all(1)


def chains(thoughts: Sequence[str], some: Sequence[Problem]) -> dict[str, float]:
    """The shares of thoughts that are a chain, right or wrong, and that are the right one."""
    written = [bool(CHAIN.match(thought)) for thought in thoughts]
    right = [thought.startswith(f"{problem.chain})") for thought, problem in zip(thoughts, some, strict=True)]
    return {"written": sum(written) / len(some), "right": sum(right) / len(some)}


@torch.no_grad()
def sampled(qs: QuietStar, tokenizer: Any, some: Sequence[Problem]) -> dict[str, Any]:
    """What there is to reinforce: of the thoughts that are sampled in training, which are right chains and what each earns.

    Returns:
        right: the share of right chains; mixed: the share of problems with right chains and others among their N thoughts;
        reward_right and reward_other: mean reward, nats; None where there is no such thought.
    """
    qs.train()
    chosen, earned = [], []
    for _, batch in batches_of([line(tokenizer, problem) for problem in some], EVAL_BATCH, qs.start_embedding.device):
        out = qs(batch["input_ids"], batch["attention_mask"], anchors=batch["anchors"], seed=len(chosen))
        earned += out.reward[:, 0].tolist()
        for ids in out.thought_ids[:, 0]:
            chain = some[len(chosen)].chain
            chosen.append([text.startswith(f"{chain})") for text in tokenizer.batch_decode(ids)])
    qs.eval()
    pairs = [pair for row, values in zip(chosen, earned, strict=True) for pair in zip(row, values, strict=True)]
    reward = {kind: [value for right, value in pairs if right == kind] for kind in (True, False)}
    return {
        "right": fmean(right for right, _ in pairs),
        "mixed": fmean(len(set(row)) > 1 for row in chosen),
        "reward_right": fmean(reward[True]) if reward[True] else None,
        "reward_other": fmean(reward[False]) if reward[False] else None,
    }


@torch.no_grad()
def of_free_text(qs: QuietStar, texts: Sequence[Example]) -> dict[str, list[float]]:
    """The loss of each text at the places where the model would think, nats, by the thoughts there; see natural_text.py."""
    anchors = [qs.choose_anchors(text["input_ids"][None])[0] for text in texts]
    chosen = [{**text, "anchors": places} for text, places in zip(texts, anchors, strict=True)]
    return held_out_losses(qs.with_config(replace(qs.thought_config, anchors="all")), chosen, True, EVAL_BATCH)


@torch.no_grad()
def written(model: Any, tokenizer: Any, some: Sequence[Problem]) -> dict[str, Any]:
    """What the model writes after each question, greedy, perhaps a chain before the answer, and whether the answer is right."""
    model.eval()
    found: list[str] = []
    for start in range(0, len(some), EVAL_BATCH):
        asked = [problem.asked for problem in some[start : start + EVAL_BATCH]]
        batch = tokenizer(asked, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        out = model.generate(
            **batch.to(model.device), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        found += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"texts": found, "right": [answered(text, problem.answer) for text, problem in zip(found, some, strict=True)]}


def answered(text: str, answer: int) -> bool:
    """Whether a text is the answer, by itself or behind an aside in brackets."""
    return re.sub(r"^ \([^)]*\)", "", text) == f" {answer}."
