"""GSM8K with a pretrained model: Quiet-STaR on written solutions, what that does to the probability of the right answer, and
what thoughts are worth in the solutions themselves.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from natural_text import with_each_thought
from phases import Phase
from pretrained_problems import ids
from pretrained_training import LORA, PLAIN, plain, think, training
from torch import Tensor

from quietstar import QuietStar, ThoughtConfig
from quietstar.checkpoints.pretrained import load_model, load_tokenizer
from quietstar.config import AdapterConfig
from quietstar.data.sources import hub_rows
from quietstar.evaluation.questions.asking import scored_answers
from quietstar.evaluation.questions.reading import Question, read_questions
from quietstar.files.reading import json_lines
from quietstar.files.writing import write_whole
from quietstar.run.batches import Example, batches_of
from quietstar.training import train

THOUGHTS = ThoughtConfig(preset="lora", thoughts=2, thought_tokens=8, lookahead=4)
LENGTH, PLACES, TEXTS = 192, 8, 8  # tokens of a text, thoughts in it, texts of an update
ARMS = {"base": (THOUGHTS, 0), "plain": (PLAIN, 4 * TEXTS), "quiet-star": (THOUGHTS, TEXTS)}
TEMPERATURES = [0.5, 0.65, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0]
EVAL_BATCH = 16


@dataclass(frozen=True)
class Solutions:
    """The experiment; its folder has the data, the models and a file for each arm."""

    model: str
    source: str  # a folder with train.jsonl and test.jsonl, or a data set on the hub
    folder: Path
    steps: int
    questions: int | None
    texts: int

    def phases(self) -> Iterator[Phase]:
        yield Phase(self.folder / "data.json", self.read)
        for arm in ARMS:
            yield Phase(self.folder / f"{arm}.json", partial(self.arm, arm))

    def read(self) -> dict[str, Any]:
        """The rows in files, without the marks for a calculator."""
        counts: dict[str, Any] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        for split, most in (("train", None), ("test", self.questions)):
            file = Path(self.source, f"{split}.jsonl")
            rows = [row for _, row in json_lines(file)] if file.exists() else hub_rows(self.source, split, None)
            rows = [{"question": x["question"], "answer": re.sub("<<.*?>>", "", x["answer"])} for x in rows][:most]
            write_whole(self.folder / f"{split}.jsonl", "".join(json.dumps(x) + "\n" for x in rows))
            counts[split] = len(rows)
        return counts

    def arm(self, arm: str) -> dict[str, Any]:
        config, lines = ARMS[arm]
        tokenizer = load_tokenizer(self.model)
        torch.manual_seed(0)
        qs = think(self.model, tokenizer, config)
        if lines:
            qs.add_adapters(AdapterConfig(lora_rank=LORA))
            rows = [row for _, row in json_lines(self.folder / "train.jsonl")]
            some = random.Random(0).sample(rows, min(len(rows), self.steps * lines))
            texts = solutions(self.model, tokenizer, some, PLACES if config is THOUGHTS else 1)
            texts = plain(texts) if config is PLAIN else texts
            train(qs, texts, training(self.folder / arm, self.steps, lines, 0, 1e-4), resume="auto")
        qs.eval()
        questions = read_questions(str(self.folder / "test.jsonl"))
        ways = ("own", "constant", "another") if arm == "quiet-star" else ()
        found: dict[str, Any] = {
            "right": log_probabilities(qs, questions, ways),
            "other": log_probabilities(qs, with_other_answers(questions), ways),
        }
        if arm == "quiet-star":
            rows = [row for _, row in json_lines(self.folder / "test.jsonl")][: self.texts]
            found["text"] = losses(qs, solutions(self.model, tokenizer, rows, PLACES))
        return found


@torch.no_grad()
def solutions(model: str, tokenizer: Any, rows: Sequence[dict[str, str]], places: int) -> list[Example]:
    """Questions with their solutions, whose tokens alone have labels. Anchors are where the prediction of the next token has
    the highest entropy in the model before any training.
    """
    base = load_model(model, dtype="float32").eval()
    found: list[Example] = []
    for row in rows:
        asked = ids(tokenizer, f"Q: {row['question']}\nA:")
        text = torch.tensor((asked + ids(tokenizer, f" {row['answer']}\n"))[:LENGTH])
        first, last = len(asked) - 1, len(text) - 2 - THOUGHTS.lookahead  # where all J tokens and one more follow
        if last - first < places:
            continue
        logits = base(text[None]).logits[0, first : last + 1] if places > 1 else torch.zeros(last + 1 - first, 1)
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
        anchors = first + entropy.topk(places).indices.sort().values
        found.append({"input_ids": text, "labels": text.index_fill(0, torch.arange(first + 1), -100), "anchors": anchors})
    return found


def with_other_answers(questions: Sequence[Question]) -> list[Question]:
    """Each with the answer of another, as long: what rises with this one's probability isn't reasoning."""
    found = list(questions)
    for length in {len(x.written) for x in questions}:
        places = [i for i, x in enumerate(questions) if len(x.written) == length]
        for i, other in zip(places, places[1:] + places[:1], strict=True):
            found[i] = replace(questions[i], answer=questions[other].answer, written=questions[other].written)
    return found


def log_probabilities(qs: QuietStar, questions: Sequence[Question], ways: Sequence[str]) -> dict[str, list[float]]:
    """The published figure, zero-shot: of each question log p of the answer's tokens, among those that an answer can have, by
    the thoughts before each: none, and those of ``ways``.
    """
    scored = scored_answers(qs, questions)
    texts = [{"input_ids": torch.tensor(x.ids), "anchors": torch.tensor(x.places) - 1} for x in scored]
    found: dict[str, list[float]] = {}
    for way, examples in by_thoughts(qs, texts, ways).items():
        base, mixed = [0.0] * len(texts), [0.0] * len(texts)
        for i, targets, _, *both in predictions(qs, examples):
            allowed = scored[i].allowed
            for out, logprobs in zip((base, mixed), both, strict=True):
                kept = logprobs[:, allowed].log_softmax(-1)
                out[i] = float(kept[allowed == targets[:, None]].double().sum())
        found |= {"none": base} | ({way: mixed} if way else {})
    return found


def losses(qs: QuietStar, texts: Sequence[Example]) -> dict[str, Any]:
    """Of each text and temperature of the prediction the mean of -log p of the tokens after its anchors, nats, and of each text
    the mean mixing weight, by the thoughts before these tokens.
    """
    nats: dict[str, list[list[float]]] = {}
    weights: dict[str, list[float]] = {}
    for way, examples in by_thoughts(qs, texts, ("own", "another", "constant", "random")).items():
        weights[way] = [0.0] * len(texts)
        for name in ("none", way):
            nats[name] = [[] for _ in texts]
        for i, targets, weight, *both in predictions(qs, examples):
            weights[way][i] = float(weight.mean())
            for name, logprobs in zip(("none", way), both, strict=True):
                by = [(logprobs / x).log_softmax(-1).gather(1, targets[:, None]).mean() for x in TEMPERATURES]
                nats[name][i] = [-float(x) for x in by]
    return {"temperatures": TEMPERATURES, "nats": nats, "weights": weights}


def by_thoughts(qs: QuietStar, texts: Sequence[Example], ways: Sequence[str]) -> dict[str, Sequence[Example]]:
    """The texts by the thoughts at their anchors; without ways some that are not used."""
    if ways:
        found = with_each_thought(qs, texts, EVAL_BATCH)
        return {way: found[way] for way in ways}
    T = qs.thought_config.thought_tokens
    return {"": [{**x, "thought_ids": torch.zeros(len(x["anchors"]), 1, T, dtype=torch.long)} for x in texts]}


@torch.no_grad()
def predictions(qs: QuietStar, examples: Sequence[Example]) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """Of each example its index, the tokens [P] after its anchors, the mixing weights [P], and the log-probabilities [P,V] of
    these tokens without thoughts and with them.
    """
    thinker = qs.thinker.predicting(1, 1)
    for chosen, batch in batches_of(examples, EVAL_BATCH, qs.start_embedding.device):
        layout = thinker.layout(batch["input_ids"], batch["attention_mask"], batch["anchors"])
        text, thought = thinker.states(layout, batch["input_ids"], batch["thought_ids"])
        h_base, h_thought = thinker.base_states(layout, text)[:, :, 0], thinker.end_states(thought, None)[:, :, 0, 0]
        for b, i in enumerate(chosen):
            places = examples[i]["anchors"]
            own = h_base[b, : len(places)], h_thought[b, : len(places)]
            weight, targets = thinker.mix(*own).weight, batch["input_ids"][b, places + 1]
            yield i, targets, weight, thinker.logprobs(own[0]), thinker.mixed_logprobs(*own)
