"""What pretrained.py measures: the answers that a model writes, with thoughts or behind an aside; what thoughts are worth."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from natural_text import with_each_thought
from pretrained_problems import Problem, ids, line
from torch import Tensor
from transformers import LogitsProcessor

from quietstar import QuietStar
from quietstar.run.batches import Example, batches_of

EVAL_BATCH = 32
NEW_TOKENS = 28  # of a chain with its answer
ANSWER_TOKENS = 6  # " 143."


@dataclass(frozen=True)
class Unless(LogitsProcessor):
    """Tokens that hold a mark are not written until one of some others has been."""

    banned: list[int]
    others: list[int]
    length: int = 0  # of the prompt

    @staticmethod
    def of(tokenizer: Any, banned: str, others: Sequence[str]) -> Unless:
        holding = [number for number in range(len(tokenizer)) if banned in tokenizer.decode([number])]
        return Unless(holding, [number for other in others for number in ids(tokenizer, other)])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        free = torch.isin(input_ids[:, self.length :], torch.tensor(self.others)).any(1)
        kept = torch.full_like(scores, 0.0).index_fill_(1, torch.tensor(self.banned), -torch.inf)
        return torch.where(free[:, None], scores, scores + kept)


@torch.no_grad()
def thinking(
    qs: QuietStar, tokenizer: Any, some: Sequence[Problem], think: str = "once", new_tokens: int = NEW_TOKENS
) -> dict[str, list[str]]:
    """What ``generate`` writes after each question, greedy, with greedy thoughts, and the first of these."""
    found: dict[str, list[str]] = {"texts": [], "thoughts": []}
    qs.eval()
    for batch in _prompts(tokenizer, some):
        thoughts: list[Tensor] = []
        out = qs.generate(
            **batch, max_new_tokens=new_tokens, think=think, do_sample=False, **_ends(tokenizer),
            on_thoughts=lambda chosen, thoughts=thoughts: thoughts.append(chosen[:, 0]),
        )  # fmt: skip
        found["texts"] += _after(tokenizer, batch, out)
        found["thoughts"] += tokenizer.batch_decode(thoughts[0])
    return found


@torch.no_grad()
def writing(
    model: Any,
    tokenizer: Any,
    some: Sequence[Problem],
    begin: str = "",
    times: int = 1,
    temperature: float = 1.0,
    forced: Unless | None = None,
) -> dict[str, list[str]]:
    """What the model writes after each question and ``begin``, that included; greedy, or sampled so many times."""
    texts: list[str] = []
    how: dict[str, Any] = (
        {"do_sample": True, "num_return_sequences": times, "top_k": 0, "temperature": temperature}
        if times > 1
        else {"do_sample": False}
    )
    torch.manual_seed(0)
    model.eval()
    for batch in _prompts(tokenizer, some, begin):
        if forced is not None:
            how["logits_processor"] = [replace(forced, length=batch["input_ids"].shape[1])]
        out = model.generate(**batch, max_new_tokens=NEW_TOKENS, **_ends(tokenizer), **how)
        texts += [begin + text for text in _after(tokenizer, batch, out)]
    return {"texts": texts}


def _ends(tokenizer: Any) -> dict[str, Any]:
    """An answer ends with its full stop."""
    return {"eos_token_id": [tokenizer.eos_token_id, *ids(tokenizer, ".")], "pad_token_id": tokenizer.pad_token_id}


def _prompts(tokenizer: Any, some: Sequence[Problem], begin: str = "") -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(some), EVAL_BATCH):
        # The tokens of a question and of what follows are apart, as in training.
        rows = [ids(tokenizer, problem.asked) + ids(tokenizer, begin) for problem in some[start : start + EVAL_BATCH]]
        batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        yield {name: batch[name] for name in ("input_ids", "attention_mask")}


def _after(tokenizer: Any, batch: dict[str, Tensor], out: Tensor) -> list[str]:
    texts: list[str] = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def without_aside(text: str) -> str:
    return re.sub(r"^ \([^)]*\)", "", text)


def worth(qs: QuietStar, tokenizer: Any, some: Sequence[Problem]) -> dict[str, list[float]]:
    """By the thoughts before the answer, none, own, another, constant or random: -log p of the answer of each problem, nats."""
    ways = with_each_thought(qs.eval(), [line(tokenizer, problem) for problem in some], EVAL_BATCH)
    found: dict[str, list[float]] = {}
    for way, examples in ways.items():
        found["none"], found[way] = predict(qs, examples)
    return found


@torch.no_grad()
def predict(qs: QuietStar, examples: Sequence[Example]) -> tuple[list[float], list[float]]:
    """-log p of each answer without the thought before it and with it, nats."""
    J = qs.thought_config.lookahead
    thinker, found = qs.thinker.predicting(1, J), []
    for chosen, batch in batches_of(examples, EVAL_BATCH, qs.start_embedding.device):
        layout = thinker.layout(batch["input_ids"], batch["attention_mask"], batch["anchors"])
        text, thought = thinker.states(layout, batch["input_ids"], batch["thought_ids"])
        h_base, h_thought = thinker.base_states(layout, text)[:, 0], thinker.end_states(thought, None)[:, 0, 0]
        for b, i in enumerate(chosen):
            anchor = int(examples[i]["anchors"])
            # Without the space before the answer: where to put an aside is not what is asked.
            targets = examples[i]["input_ids"][anchor + 2 : anchor + 1 + J, None]
            both = thinker.logprobs(h_base[b]), thinker.mixed_logprobs(h_base[b], h_thought[b])
            found.append([-float(logprobs[1:].gather(1, targets).sum()) for logprobs in both])
    without, nats = zip(*found, strict=True)
    return list(without), list(nats)


@torch.no_grad()
def sampled(qs: QuietStar, tokenizer: Any, some: Sequence[Problem]) -> dict[str, Any]:
    """What there is to reinforce: the N thoughts about each problem that are sampled in training, and their rewards."""
    qs.train()
    texts: list[str] = []
    rewards: list[float] = []
    for _, batch in batches_of([line(tokenizer, problem) for problem in some], EVAL_BATCH, qs.start_embedding.device):
        out = qs(batch["input_ids"], batch["attention_mask"], anchors=batch["anchors"], seed=len(texts))
        rewards += out.reward[:, 0].flatten().tolist()
        texts += tokenizer.batch_decode(out.thought_ids[:, 0].flatten(0, 1))
    qs.eval()
    return {"thoughts": texts, "rewards": rewards}
