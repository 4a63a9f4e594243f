"""How many questions a model answers with thoughts and without: exact match, majority vote, probability of the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from quietstar.evaluation.questions.answer_tokens import ScoredAnswer, encode, scored_answers
from quietstar.evaluation.questions.answers import STOP, extract, vote
from quietstar.evaluation.questions.continuations import batches, continue_texts
from quietstar.evaluation.questions.reading import Question
from quietstar.evaluation.questions.report import AccuracyReport, AskedQuestion, GivenAnswer
from quietstar.evaluation.scoring import score_tokens
from quietstar.generate import Thinking
from quietstar.hf.modules import dropout_off, unwrapped
from quietstar.model import QuietStar
from quietstar.run.batches import mix_seed


@dataclass(frozen=True)
class Asking:
    """How questions are asked.

    Attributes:
        think: before which tokens of an answer, as in ``QuietStar.generate``; thoughts are greedy.
        max_new_tokens: of a generated answer.
        answer_prefix: how a generated answer begins, such as " Let's think step by step."; the probability is taken without.
        votes: answers to sample for a majority; 0 for none.
        temperature: of those answers' tokens.
        seed: of those answers; with the batch size it fixes them.
        batch_size: questions at once.

    Raises:
        ValueError: a value outside its range, by name.
    """

    think: str | float = "always"
    max_new_tokens: int = 256
    answer_prefix: str = ""
    votes: int = 0
    temperature: float = 0.7
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        Thinking(self.think, 1, False, None, None, None)
        for name, least in (("max_new_tokens", 1), ("votes", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"Asking: {name} must be {least} or more, got {getattr(self, name)!r}")
        if not self.temperature > 0:
            raise ValueError(f"Asking: temperature must be more than 0, got {self.temperature!r}")


@torch.no_grad()
def ask(qs: QuietStar, questions: Sequence[Question], asking: Asking | None = None, progress: bool = False) -> AccuracyReport:
    """Ask all questions, without an example (zero-shot), with thoughts and, on the same questions, without.

    The prompt is the published one, ``Q: ...`` then for choices ``(A) ...`` a line each, then ``A:``. Three measures:
        exact match: the greedy answer's text, up to the next ``Q:``, gives the right answer; see ``answers.extract``.
        majority: the most frequent answer of ``votes`` sampled ones is the right one; see ``answers.vote``.
        probability: that of the right answer's tokens, taught one after the other, among the tokens that an answer can be made
        of; what the published code calls accuracy, see ``answer_tokens.scored_answers``.

    Raises:
        ValueError: no tokenizer or one of another vocabulary, no question, or questions too long for the model's positions;
            before the first is asked.
    """
    asking = asking or Asking()
    if qs.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer")
    if not questions:
        raise ValueError("there is no question")
    prompts = [encode(qs, prompt(question) + asking.answer_prefix) for question in questions]
    scored = scored_answers(qs, [(prompt(question), question) for question in questions])
    _check_room(qs, prompts, scored, asking.max_new_tokens)

    modes: dict[str, str | float] = {"thinking": asking.think} if asking.think != "never" else {}
    modes["base"] = "never"
    total = len(questions) * (len(modes) * (1 + asking.votes) + 1)
    with tqdm(total=total, desc="questions", leave=False, disable=not progress) as bar, dropout_off(qs):
        probabilities = _probabilities(qs, scored, asking, bar.update)
        answers = {
            name: _answers(qs, questions, prompts, think, probabilities[name], asking, bar.update)
            for name, think in modes.items()
        }
    asked = [AskedQuestion(q, {name: answers[name][i] for name in modes}) for i, q in enumerate(questions)]
    return AccuracyReport(_describe(qs), asking, asked)


def prompt(question: Question) -> str:
    """The published zero-shot prompt, up to where the answer begins."""
    choices = "".join(f"\n({label}) {text}" for label, text in question.choices.items())
    return f"Q: {question.text}{choices}\nA:"


def _check_room(qs: QuietStar, prompts: list[list[int]], scored: list[ScoredAnswer], new_tokens: int) -> None:
    """Rotary positions have no end, but past the longest of the model's training its predictions say nothing."""
    limit = getattr(qs.config.get_text_config(), "max_position_embeddings", None)
    rows = qs.thought_config.thought_tokens + 2  # behind all tokens but the last
    needs = [max(len(ids) + new_tokens, len(x.ids)) - 1 + rows for ids, x in zip(prompts, scored, strict=True)]
    if limit and max(needs) > limit:
        long = sum(need > limit for need in needs)
        raise ValueError(
            f"{long:,} of {len(needs):,} questions are too long: with {new_tokens} new tokens and "
            f"a thought they need up to {max(needs)} positions, and {type(qs.model).__name__} has {limit}"
        )


def _probabilities(
    qs: QuietStar, scored: list[ScoredAnswer], asking: Asking, done: Callable[[int], Any]
) -> dict[str, list[float]]:
    """Of each question, under "base" and "thinking"."""
    found: dict[str, dict[int, float]] = {"base": {}, "thinking": {}}
    for chosen in batches([x.ids for x in scored], asking.batch_size):
        batch = [scored[i] for i in chosen]
        parts = ([x.ids for x in batch], [x.places for x in batch], asking.think, [x.allowed for x in batch])
        for i, (base, mixed) in zip(chosen, score_tokens(qs, *parts), strict=True):
            found["base"][i], found["thinking"][i] = (float(x.logprob.double().sum().exp()) for x in (base, mixed))
        done(len(chosen))
    return {name: [values[i] for i in range(len(scored))] for name, values in found.items()}


def _answers(
    qs: QuietStar,
    questions: Sequence[Question],
    prompts: list[list[int]],
    think: str | float,
    probabilities: list[float],
    asking: Asking,
    done: Callable[[int], Any],
) -> list[GivenAnswer]:
    texts = _write(qs, prompts, think, asking, None, done)
    sampled = [_write(qs, prompts, think, asking, number, done) for number in range(asking.votes)]
    answers = []
    for i, question in enumerate(questions):
        votes = [extract(several[i], question.choices) for several in sampled]
        answers.append(GivenAnswer(texts[i], extract(texts[i], question.choices), probabilities[i], votes, vote(votes)))
    return answers


def _write(
    qs: QuietStar,
    prompts: list[list[int]],
    think: str | float,
    asking: Asking,
    sample: int | None,
    done: Callable[[int], Any],
) -> list[str]:
    """The answers' texts: greedy ones, or the ``sample``-th sampled ones."""
    device = qs.start_embedding.device
    options: dict[str, Any] = {"do_sample": False}
    if sample is not None:
        options = {"do_sample": True, "temperature": asking.temperature, "top_p": 1.0, "top_k": 0}
    texts: dict[int, str] = {}
    for number, chosen in enumerate(batches(prompts, asking.batch_size)):
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(mix_seed(mix_seed(asking.seed, sample or 0), number))
            batch = [prompts[i] for i in chosen]
            written = continue_texts(qs, batch, asking.max_new_tokens, STOP, think=think, **options)
        texts |= dict(zip(chosen, written, strict=True))
        done(len(chosen))
    return [texts[i] for i in range(len(prompts))]


def _describe(qs: QuietStar) -> dict[str, Any]:
    config = qs.thought_config
    names = ("preset", "mixing", "thought_tokens")
    return {"class": type(unwrapped(qs.model)).__name__, "name": qs.config.name_or_path} | {
        name: getattr(config, name) for name in names
    }
