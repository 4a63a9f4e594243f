"""What a row of a data set holds in place of a text: a question with its answer, or a conversation."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from quietstar.files.reading import as_type, reason_of

Value = str | int | float
Messages = tuple[tuple[str, str], ...]  # the role and the content of each


class Choice(msgspec.Struct):
    label: Value
    text: Value


class Choices(msgspec.Struct):
    label: list[Value]
    text: list[Value]


class Stem(msgspec.Struct):
    stem: str
    choices: list[str | Choice] | Choices | None = None


class Row(msgspec.Struct):
    """A question, in one of the forms that ``read_questions`` describes; other fields are ignored."""

    question: str | Stem
    choices: list[str | Choice] | Choices | None = None
    answer: Value | None = None
    answerKey: Value | None = None
    rationale: str | None = None


class Message(msgspec.Struct):
    role: str
    content: str


class Conversation(msgspec.Struct):
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]


def messages_of(row: Any, where: str) -> Messages:
    """The conversation in a row. Raises ValueError if it is invalid; its message begins with ``where``."""
    return tuple((x.role, x.content) for x in as_type(Conversation, row, where).messages)


def question_and_answer(row: Row, where: str) -> tuple[str, dict[str, str], str]:
    """A question, its choices by their labels, and the answer as the row has it, or the right label if there are choices.

    Raises ValueError if the row is invalid; its message begins with ``where``.
    """
    asked = row.question if isinstance(row.question, Stem) else Stem(row.question, row.choices)
    text = asked.stem.strip()
    if not text:
        raise ValueError(f"{where} has no text in a field 'question'")
    answer = row.answer if row.answerKey is None else row.answerKey
    if answer is None or answer == "":
        raise ValueError(f"{where} has no answer in a field 'answer' or 'answerKey'")
    if asked.choices is None:
        return text, {}, str(answer).strip()
    choices = _labelled(asked.choices, where)
    return text, choices, _label(answer, choices, where)


def with_choices(question: str, choices: Mapping[str, str]) -> str:
    """A question with a line ``(A) ...`` for each choice."""
    return question + "".join(f"\n({label}) {text}" for label, text in choices.items())


def zero_shot(question: str) -> str:
    """The published prompt without examples, up to where the answer begins."""
    return f"Q: {question}\nA:"


def chat_text(tokenizer: Any, messages: Messages, begin_answer: bool = False) -> str:
    """A conversation as the tokenizer's chat template writes it. It has its special tokens: the tokenizer must add none.

    Args:
        begin_answer: end with what the assistant's next message begins with.

    Raises:
        ValueError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template, which messages need: take an instruct model")
    turns = [{"role": role, "content": content} for role, content in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=begin_answer)
    except Exception as error:  # a template is code, and may raise anything
        raise ValueError(f"the tokenizer's chat template refuses the messages: {reason_of(error)}") from error
    return text if begin_answer else text.rstrip("\r\n")


def _labelled(choices: list[str | Choice] | Choices, where: str) -> dict[str, str]:
    if isinstance(choices, Choices):
        labels, texts = choices.label, choices.text
    else:
        labels = [
            x.label if isinstance(x, Choice) else letter for x, letter in zip(choices, string.ascii_uppercase, strict=False)
        ]
        texts = [x.text if isinstance(x, Choice) else x for x in choices]
    labelled = {str(label): str(text).strip() for label, text in zip(labels, texts, strict=False)}
    if len(labelled) < 2 or not len(labelled) == len(labels) == len(texts):
        raise ValueError(
            f"{where} must have two choices or more, with different labels, got {len(texts)} with {len(labelled)} labels"
        )
    return labelled


def _label(answer: Value, choices: Mapping[str, str], where: str) -> str:
    if str(answer) in choices:
        return str(answer)
    if isinstance(answer, int) and 0 <= answer < len(choices):
        return list(choices)[answer]
    labels = [label for label, text in choices.items() if text == str(answer).strip()]
    if len(labels) != 1:
        raise ValueError(f"{where} has the answer {answer!r}, and its choices are {', '.join(choices)}")
    return labels[0]
