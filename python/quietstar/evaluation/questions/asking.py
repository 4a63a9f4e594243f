"""Ask a model questions with and without thoughts: exact match, majority vote, probability of the right answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from quietstar.data.rows import chat_text, question_messages, with_choices, zero_shot
from quietstar.evaluation.questions.answers import STOP, batches_by_length, continue_texts, extract, vote
from quietstar.evaluation.questions.reading import Question
from quietstar.evaluation.questions.report import AccuracyReport, AnsweredQuestion, Asking, ModelAnswer
from quietstar.evaluation.scoring import score_tokens
from quietstar.hf.modules import dropout_off, unwrapped
from quietstar.model import QuietStar
from quietstar.run.batches import mix_seed
from quietstar_kernels.checks import flag, instance, items

SPACES = "▁Ġ "  # ways that vocabularies write the space at the start of a token


@dataclass(frozen=True)
class ScoredAnswer:
    """A prompt with its right answer."""

    ids: list[int]  # tokens of the prompt, the answer and the line end
    places: list[int]  # indices of the tokens whose probabilities are multiplied
    allowed: Tensor  # int64 [...], the token ids that these probabilities are normalised over


def scored_answers(qs: QuietStar, questions: Sequence[Question], chat: bool = False) -> list[ScoredAnswer]:
    """The tokens that the published probability of each right answer needs.

    As in ``compute_metrics`` of the published code, the text is the prompt, a space, the answer and a line end. The probability
    is the product of p(token) over the answer's tokens and the line end, each given the right tokens before it, among the
    tokens that an answer can have: for a number those of digits alone and the line end, for choices those of the labels and the
    line end. Other tokens, such as the comma of "1,000" or a single space, are skipped. The published code calls the mean over
    questions accuracy.

    There are three differences. The published code knows only Mistral's token ids; here they are found for any tokenizer, and
    for Mistral's they are the same. It cuts long texts at random to 256 tokens; here nothing is cut. And for a number that
    begins with a minus it uses the set of letters.

    With ``chat`` the text is the question and the answer as messages, and what ends the answer's takes the line end's place.
    """
    digits = _digit_tokens(qs)
    found = []
    for question in questions:
        head, ids = (encode(qs, asked(qs, question, chat, answer), chat) for answer in (None, question.written))
        start, own = len(commonprefix([head, ids])), digits
        if question.choices:
            tails = [set(encode(qs, asked(qs, question, chat, label), chat)[start:]) for label in question.choices]
            own = tails[0].union(*tails) - tails[0].intersection(*tails)
        if not start or not own.intersection(ids[start:]):
            written = repr(question.written)
            raise ValueError(f"the tokenizer has no tokens for the answer {written} alone, so it has no probability")
        places = [i for i in range(start, len(ids)) if ids[i] in own or i == len(ids) - 1]
        allowed = torch.tensor(sorted({*own, ids[-1]}), device=qs.start_embedding.device)
        found.append(ScoredAnswer(ids, places, allowed))
    return found


def asked(qs: QuietStar, question: Question, chat: bool, answer: str | None = None) -> str:
    """A question up to where the answer begins, or with an answer and what ends it."""
    if not chat:
        return prompt(question) + ("" if answer is None else f" {answer}\n")
    messages = question_messages(question.system, with_choices(question.text, question.choices), answer)
    return chat_text(qs.tokenizer, messages, begin_answer=answer is None)


def encode(qs: QuietStar, text: str, chat: bool = False) -> list[int]:
    """Token ids of a text to be continued. Raises ValueError if they are not in the model's vocabulary."""
    assert qs.tokenizer is not None
    ids = list(qs.tokenizer(text, verbose=False, add_special_tokens=not chat)["input_ids"])
    if not chat and len(ids) > 1 and ids[-1] == qs.tokenizer.eos_token_id:
        ids.pop()  # some tokenizers end every text
    V = qs.lm_head.linear.out_features
    if not ids or max(ids) >= V:
        got = f"id {max(ids)}, and the vocabulary has {V} tokens" if ids else f"no tokens for {text[:40]!r}"
        raise ValueError(f"the tokenizer belongs to another model: it gives {got}")
    return ids


def _digit_tokens(qs: QuietStar) -> set[int]:
    """Ids of the tokens that consist of ASCII digits, with or without a space before them."""
    assert qs.tokenizer is not None
    count = min(len(qs.tokenizer), qs.lm_head.linear.out_features)
    entries = (str(entry).lstrip(SPACES) for entry in qs.tokenizer.convert_ids_to_tokens(list(range(count))))
    return {i for i, entry in enumerate(entries) if entry.isascii() and entry.isdigit()}


@torch.no_grad()
def ask(qs: QuietStar, questions: Sequence[Question], asking: Asking | None = None, progress: bool = False) -> AccuracyReport:
    """Ask all questions without examples (zero-shot), once with thoughts and once without.

    The prompt is the published one: ``Q: ...``, for choices a line ``(A) ...`` each, then ``A:``. With ``asking.chat`` it is a
    user's message, without ``Q:`` and ``A:``, in the tokenizer's chat template. There are three measures:
        exact match: the text of the greedy answer, up to the next ``Q:``, gives the right answer; see ``answers.extract``.
        majority: the most frequent of ``votes`` sampled answers is right; see ``answers.vote``.
        probability: that of the right answer's tokens, each given the right ones before it, among the tokens that an answer can
        have. This is what the published code calls accuracy; see ``scored_answers``.

    Raises:
        ValueError: before the first question is asked: there is no question, no tokenizer or one of another vocabulary, or
            questions are too long for the model's positions.
    """
    asking = Asking() if asking is None else instance("asking", asking, Asking)
    if instance("qs", qs, QuietStar).tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer")
    if not items("questions", questions):
        raise ValueError("questions: there is no question")
    for question in questions:
        instance("questions", question, Question)
    flag("progress", progress)
    prompts = [encode(qs, asked(qs, question, asking.chat) + asking.answer_prefix, asking.chat) for question in questions]
    scored = scored_answers(qs, questions, asking.chat)
    _check_length(qs, prompts, scored, asking.max_new_tokens)

    modes: dict[str, str | float] = {"thinking": asking.think} if asking.think != "never" else {}
    modes["base"] = "never"
    total = len(questions) * (len(modes) * (1 + asking.votes) + 1)
    with tqdm(total=total, desc="questions", leave=False, disable=not progress) as bar, dropout_off(qs):
        probabilities = _probabilities(qs, scored, asking, bar.update)
        answers = {
            name: _answer_all(qs, questions, prompts, think, probabilities[name], asking, bar.update)
            for name, think in modes.items()
        }
    answered = [AnsweredQuestion(q, {name: answers[name][i] for name in modes}) for i, q in enumerate(questions)]
    model = {"class": type(unwrapped(qs.model)).__name__, "name": qs.config.name_or_path}
    model |= {name: getattr(qs.thought_config, name) for name in ("preset", "mixing", "thought_tokens")}
    return AccuracyReport(model, asking, answered)


def prompt(question: Question) -> str:
    """The published zero-shot prompt, up to where the answer begins."""
    return zero_shot(with_choices(question.text, question.choices), question.system)


def _check_length(qs: QuietStar, prompts: list[list[int]], scored: list[ScoredAnswer], new_tokens: int) -> None:
    """Raises ValueError if a question needs more positions than the model was trained on, rotary or not."""
    limit = getattr(qs.config.get_text_config(), "max_position_embeddings", None)
    rows = qs.thought_config.thought_tokens + 2  # after every token except the last
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
    """The probability of each right answer, under "base" and "thinking"."""
    found: dict[str, dict[int, float]] = {"base": {}, "thinking": {}}
    for chosen in batches_by_length([x.ids for x in scored], asking.batch_size):
        batch = [scored[i] for i in chosen]
        parts = ([x.ids for x in batch], [x.places for x in batch], asking.think, [x.allowed for x in batch])
        for i, (base, mixed) in zip(chosen, score_tokens(qs, *parts), strict=True):
            found["base"][i], found["thinking"][i] = (float(x.logprob.double().sum().exp()) for x in (base, mixed))
        done(len(chosen))
    return {name: [values[i] for i in range(len(scored))] for name, values in found.items()}


def _answer_all(
    qs: QuietStar,
    questions: Sequence[Question],
    prompts: list[list[int]],
    think: str | float,
    probabilities: list[float],
    asking: Asking,
    done: Callable[[int], Any],
) -> list[ModelAnswer]:
    texts = _generate(qs, prompts, think, asking, None, done)
    sampled = [_generate(qs, prompts, think, asking, number, done) for number in range(asking.votes)]
    answers = []
    for i, question in enumerate(questions):
        found, *votes = (extract(several[i], question.choices, question.answer) for several in (texts, *sampled))
        answers.append(ModelAnswer(texts[i], found, probabilities[i], votes, vote(votes)))
    return answers


def _generate(
    qs: QuietStar, prompts: list[list[int]], think: str | float, asking: Asking, sample: int | None, done: Callable[[int], Any]
) -> list[str]:
    """Texts of the answers: the greedy ones for None, else the ``sample``-th sampled ones."""
    device = qs.start_embedding.device
    options: dict[str, Any] = {"do_sample": False}
    if sample is not None:
        options = {"do_sample": True, "temperature": asking.temperature, "top_p": 1.0, "top_k": 0}
    texts: dict[int, str] = {}
    for number, chosen in enumerate(batches_by_length(prompts, asking.batch_size)):
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(mix_seed(mix_seed(asking.seed, sample or 0), number))
            batch = [prompts[i] for i in chosen]
            stop = () if asking.chat else STOP
            written = continue_texts(qs, batch, asking.max_new_tokens, stop, think=think, **options)
        texts |= dict(zip(chosen, written, strict=True))
        done(len(chosen))
    return [texts[i] for i in range(len(prompts))]
