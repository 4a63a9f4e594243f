"""GSM8K with a pretrained model: Quiet-STaR on written solutions, what that does to the probability of the right answer, and
what thoughts are worth in the solutions themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from natural_text import with_each_thought
from phases import Phase
from pretrained_training import LORA, PLAIN, think, training
from torch import Tensor

from quietstar import QuietStar, ThoughtConfig
from quietstar.checkpoints.pretrained import load_tokenizer
from quietstar.config import AdapterConfig
from quietstar.data.sources import hub_rows
from quietstar.data.texts import DataConfig, load_data
from quietstar.evaluation.questions.asking import scored_answers
from quietstar.evaluation.questions.reading import read_questions
from quietstar.evaluation.scoring import one_thought
from quietstar.files.reading import json_lines
from quietstar.files.writing import write_whole
from quietstar.run.batches import Example, batches_of
from quietstar.training import train

# At the eight tokens of a text that are hardest to predict.
THOUGHTS = ThoughtConfig(preset="lora", thoughts=2, thought_tokens=8, lookahead=4, anchors="entropy", anchor_count=8)
LENGTH, TEXTS = 96, 8  # tokens of a text, texts of an update
ARMS = {"base": (THOUGHTS, 0), "quiet-star": (THOUGHTS, TEXTS), "plain": (PLAIN, 4 * TEXTS)}
TEMPERATURES = [0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0]
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
        """Questions, and texts with their written solutions, without the marks for a calculator."""
        counts: dict[str, Any] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        for split, most in (("train", None), ("test", self.questions)):
            file = Path(self.source, f"{split}.jsonl")
            rows = [row for _, row in json_lines(file)] if file.exists() else hub_rows(self.source, split, None)
            rows = [{"question": x["question"], "answer": re.sub("<<.*?>>", "", x["answer"])} for x in rows][:most]
            texts = [{"text": f"Q: {x['question']}\nA: {x['answer']}"} for x in rows]
            for name, written in (("questions", rows), ("texts", texts)):
                lines = (json.dumps(x) + "\n" for x in written)
                write_whole(self.folder / f"{split}-{name}.jsonl", "".join(lines))
            counts[split] = len(rows)
        return counts

    def arm(self, arm: str) -> dict[str, Any]:
        config, lines = ARMS[arm]
        tokenizer = load_tokenizer(self.model)
        read = load_data(self._texts("train"), tokenizer, THOUGHTS.lookahead)
        torch.manual_seed(0)
        qs = think(self.model, tokenizer, config)
        if lines:
            qs.add_adapters(AdapterConfig(lora_rank=LORA))
            train(qs, read.train, training(self.folder / arm, self.steps, lines, 0, 1e-4), resume="auto")
        qs.eval()
        found: dict[str, Any] = {"probability": probabilities(qs, self.folder / "test-questions.jsonl", arm == "quiet-star")}
        if arm == "quiet-star":
            some = load_data(self._texts("test"), tokenizer, THOUGHTS.lookahead).train[: self.texts]
            found["text"] = losses(qs, some)
        return found

    def _texts(self, split: str) -> DataConfig:
        return DataConfig(str(self.folder / f"{split}-texts.jsonl"), length=LENGTH, pack=False, held_out=0)


def probabilities(qs: QuietStar, questions: Path, thinks: bool) -> dict[str, list[float]]:
    """The published figure, zero-shot: of each question the probability of the right answer's tokens, by the thoughts before
    each: none, and of a model that thinks its own or a constant one.
    """
    scored = scored_answers(qs, read_questions(str(questions)))
    texts = [{"input_ids": torch.tensor(x.ids), "anchors": torch.tensor(x.places) - 1} for x in scored]
    found: dict[str, list[float]] = {}
    for way, examples in ways(qs, texts, ("own", "constant") if thinks else ()).items():
        base, mixed = [0.0] * len(texts), [0.0] * len(texts)
        for i, targets, _, *both in predictions(qs, examples):
            allowed = scored[i].allowed
            for out, logprobs in zip((base, mixed), both, strict=True):
                kept = logprobs[:, allowed].log_softmax(-1)
                out[i] = float(kept[allowed == targets[:, None]].double().sum().exp())
        found |= {"none": base} | ({way: mixed} if thinks else {})
    return found


def losses(qs: QuietStar, texts: Sequence[Example]) -> dict[str, Any]:
    """What thoughts are worth where the model would think in free text: of each text and temperature of the prediction the mean
    of -log p of the tokens there, nats, and of each text the mean mixing weight, by the thoughts before these tokens.
    """
    anchors = [qs.choose_anchors(text["input_ids"][None])[0] for text in texts]
    chosen = [{**text, "anchors": places} for text, places in zip(texts, anchors, strict=True)]
    nats: dict[str, list[list[float]]] = {}
    weights: dict[str, list[float]] = {}
    for way, examples in ways(qs, chosen, ("own", "another", "constant", "random")).items():
        weights[way] = [0.0] * len(texts)
        for name in ("none", way):
            nats[name] = [[] for _ in texts]
        for i, targets, weight, *both in predictions(qs, examples):
            weights[way][i] = float(weight.mean())
            for name, logprobs in zip(("none", way), both, strict=True):
                by = [(logprobs / x).log_softmax(-1).gather(1, targets[:, None]).mean() for x in TEMPERATURES]
                nats[name][i] = [-float(x) for x in by]
    return {"temperatures": TEMPERATURES, "nats": nats, "weights": weights}


def ways(qs: QuietStar, texts: Sequence[Example], names: Sequence[str]) -> dict[str, Sequence[Example]]:
    """The texts by the thoughts at their anchors; without names some that are not used."""
    if names:
        found = with_each_thought(qs.with_config(replace(qs.thought_config, anchors="all")), texts, EVAL_BATCH)
        return {name: found[name] for name in names}
    T = qs.thought_config.thought_tokens
    return {"": [{**x, "thought_ids": torch.zeros(len(x["anchors"]), 1, T, dtype=torch.long)} for x in texts]}


@torch.no_grad()
def predictions(qs: QuietStar, examples: Sequence[Example]) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """Of each example its index, the tokens [P] after its anchors, the mixing weights [P], and the log-probabilities [P,V] of
    these tokens without thoughts and with them.
    """
    thinker = one_thought(qs).thinker
    for chosen, batch in batches_of(examples, EVAL_BATCH, qs.start_embedding.device):
        layout = thinker.layout(batch["input_ids"], batch["attention_mask"], batch["anchors"])
        text, thought = thinker.states(layout, batch["input_ids"], batch["thought_ids"])
        h_base, h_thought = thinker.base_states(layout, text)[:, :, 0], thinker.end_states(thought, None)[:, :, 0, 0]
        for b, i in enumerate(chosen):
            places = examples[i]["anchors"]
            own = h_base[b, : len(places)], h_thought[b, : len(places)]
            weight, targets = thinker.mix(*own).weight, batch["input_ids"][b, places + 1]
            yield i, targets, weight, thinker.logprobs(own[0]), thinker.mixed_logprobs(*own)
