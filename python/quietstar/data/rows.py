"""What a row of a data set holds: a text, a conversation, or a question with its answer."""

from __future__ import annotations

import copy
import json
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from quietstar.files.reading import as_type, json_value, reason_of

Value = str | int | float
MARK = "####"  # precedes the value in an answer of GSM8K

CONVERSATIONS = ("messages", "conversations", "conversation")
QUESTIONS = ("question", "problem", "query", "instruction")
ANSWERS = ("solution", "response", "output", "completion")  # of a question without answer; else a chain before it
HANDED = ("tools", "functions", "documents")  # fields of a row that a chat template is handed beside the messages
LINKS = ("role", "type", "id", "tool_call_id", "index")  # what a template may leave out: kinds and numbers of other fields
ROLES = {  # of ShareGPT
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "assistant", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool"), "tool"),
    "system": "system",
}
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
SENTINEL = "qzxjvk"


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
    """A question, with the names that its fields have in most data; other fields are ignored."""

    question: str | Stem
    choices: list[str | Choice] | Choices | None = None
    answer: Value | None = None
    answerKey: Value | None = None
    rationale: list[str] = []
    context: str | None = None
    input: str | None = None
    system: str | None = None


class Message(msgspec.Struct):
    role: str
    content: str | list[dict[str, Any]] | None = None


class Conversation(msgspec.Struct):
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]


class Messages(tuple[Any, ...]):
    """A conversation, which compares and hashes: role and content of each message; as JSON, messages that have more than
    these, and what else the template is handed. ``where`` is its place in the data, for errors."""

    where = ""

    @classmethod
    def of(cls, turns: Sequence[Mapping[str, Any]], where: str = "", **others: Any) -> Messages:
        own = cls(
            (x["role"], x["content"]) if x.keys() == {"role", "content"} and isinstance(x["content"], str) else json.dumps(x)
            for x in (*turns, *([others] if others else []))
        )
        own.where = where
        return own

    def handed(self) -> dict[str, Any]:
        """The template's arguments by name."""
        parts = [json.loads(x) if isinstance(x, str) else {"role": x[0], "content": x[1]} for x in self]
        others: dict[str, Any] = next((x for x in parts if "role" not in x), {})
        return {"messages": [x for x in parts if "role" in x], **others}


Text = str | Messages


@dataclass(frozen=True)
class Asked:
    """A question with its answer.

    Attributes:
        system: a system prompt; may be empty, as may ``chain``.
        choices: the text of each choice by its label; empty if there are none.
        chain: what is written before the answer.
        answer: as the row has it, or the right label if there are choices.
    """

    system: str
    text: str
    choices: dict[str, str]
    chain: str
    answer: str

    @property
    def written(self) -> str:
        """Chain and answer, as in GSM8K."""
        said = (f"{MARK} {self.answer}", f"boxed{{{self.answer}}}")
        return self.chain if any(x in self.chain for x in said) else f"{self.chain}\n{said[0]}" if self.chain else self.answer


def row_text(row: Any, text_field: str, chat: bool, where: str) -> Text:
    """The text of a row, by the first of these that it has: a field "text", messages, prompt and completion, a question.

    Args:
        text_field: the field that must have the text; empty for any of the above.
        chat: write a question and its answer as messages.

    Raises:
        ValueError: there is none of these, or it is invalid; the message begins with ``where``.
    """
    row = row if isinstance(row, dict) else {}
    fields = _given(row)
    text = row.get(text_field or "text")
    if isinstance(text, str) and (text_field or text):
        return text
    if not text_field:
        for name in CONVERSATIONS:
            if name in fields:
                return _conversation(fields[name], fields, where)
        if {"prompt", "completion"} <= fields.keys() and not (chat and isinstance(fields["prompt"], str)):
            prompt, completion = fields["prompt"], fields["completion"]
            if not any(isinstance(prompt, kind) and isinstance(completion, kind) for kind in (str, list)):
                raise ValueError(f"{where}: prompt and completion must both be text or both be messages")
            return prompt + completion if isinstance(prompt, str) else _conversation(prompt + completion, fields, where)
        if _question_name(fields):
            return _question_text(question_and_answer(row, where), chat, where)
        if text == "":
            return text
        if row.get("messages") == []:
            as_type(Conversation, row, where)
    found = ", ".join(map(repr, row))[:200] or "no fields"
    value = f" (it is {json.dumps(text, default=str)[:40]})" if (text_field or "text") in row else ""
    others = ", which text_field names" if text_field else ", no messages and no question"
    raise ValueError(f"{where} has no text in a field {text_field or 'text'!r}{value}{others}: it has {found}")


def question_and_answer(row: Any, where: str) -> Asked:
    """The question in a row. Raises ValueError if it is invalid; its message begins with ``where``."""
    fields = _given(row) if isinstance(row, dict) else {}
    name = _question_name(fields)
    if "history" in fields:
        raise ValueError(f"{where} has earlier turns in a field 'history', which only messages can have")
    long = next((fields[x] for x in ANSWERS if x in fields), None)
    answered = "answer" in fields or "answerKey" in fields
    chain = [fields[x] for x in ("rationale", "steps") if x in fields]
    if answered and long is not None and name != "question":  # whose other fields are not a part of it
        chain.append(long)
    given = {x: fields[x] for x in Row.__struct_fields__ if x in fields}
    given["rationale"] = [part for x in chain for part in (x if isinstance(x, list) else [x])]
    given |= {} if answered else {"answer": long}
    given |= {"question": fields[name]} if name else {}
    given["system"] = fields.get("system", fields.get("system_prompt"))
    known = as_type(Row, given if isinstance(row, dict) else row, where)
    asked = known.question if isinstance(known.question, Stem) else Stem(known.question, known.choices)
    if not (text := asked.stem.strip()):
        raise ValueError(f"{where} has no text in a field 'question'")
    choices = {} if asked.choices is None else _labelled(asked.choices, where)
    answers = [x for x in (known.answerKey, known.answer) if x is not None]
    right = {_label(x, choices, where) if choices else str(x).strip() for x in answers}
    if len(right) != 1:
        found = "two answers" if right else "no answer"
        raise ValueError(f"{where} has {found} in a field 'answer' or 'answerKey'")
    parts = [x.strip() for x in (known.context or "", text, known.input or "")]
    return Asked(
        known.system or "", "\n\n".join(x for x in parts if x), choices, "\n".join(known.rationale).strip(), right.pop()
    )


def with_choices(question: str, choices: Mapping[str, str]) -> str:
    """A question with a line ``(A) ...`` for each choice."""
    return question + "".join(f"\n({label}) {text}" for label, text in choices.items())


def zero_shot(question: str, system: str = "") -> str:
    """The published prompt without examples, up to where the answer begins; a system prompt is a paragraph before it."""
    return (f"{system}\n\n" if system else "") + f"Q: {question}\nA:"


def question_messages(system: str, question: str, answer: str | None = None, where: str = "") -> Messages:
    """A question, with or without an answer, as messages."""
    turns = [("system", system)] * bool(system) + [("user", question)] + [("assistant", answer)] * (answer is not None)
    return Messages.of([{"role": role, "content": content} for role, content in turns], where)


def chat_text(tokenizer: Any, messages: Sequence[Any], begin_answer: bool = False) -> str:
    """A conversation as the tokenizer's chat template writes it. It has its special tokens: the tokenizer must add none.

    Args:
        messages: ``Messages``, or role and content of each.
        begin_answer: end with what the assistant's next message begins with.

    Raises:
        ValueError: the tokenizer has no chat template, or the template refuses the messages or has no place for a field.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template, which messages need: take an instruct model")
    chat = messages if isinstance(messages, Messages) else Messages(messages)
    given, where = chat.handed(), f"{chat.where}: " if chat.where else ""

    def write(messages: list[dict[str, Any]], **others: Any) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begin_answer, **others)

    try:
        given["messages"] = _contents(write, given)
        text = write(**given)
    except Exception as error:  # a template is code, and may raise anything
        raise ValueError(f"{where}the tokenizer's chat template refuses the messages: {reason_of(error)}") from error
    switches = {x: value for x, value in given.items() if x not in ("messages", *HANDED)}
    if path := _dropped(write, given, (str(tokenizer.chat_template), begin_answer, *given, str(switches))):
        name = ".".join(x for x in path if isinstance(x, str)).removeprefix("messages.")
        of = f" of a message of role {given['messages'][path[1]]['role']!r}" if path[0] == "messages" else ""
        model = tokenizer.name_or_path or type(tokenizer).__name__
        raise ValueError(f"{where}the chat template of {model} has no place for the field {name!r}{of}, or for thoughts in it")
    return text if begin_answer else text.rstrip("\r\n")


def _contents(write: Callable[..., str], given: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages; null and parts as one text if the template drops them, spells them out as Python or JSON, or fails."""
    messages = given["messages"]
    odd = [i for i, x in enumerate(messages) if not isinstance(x.get("content", ""), str)]
    if not odd:
        return messages
    contents = [messages[i]["content"] for i in odd]
    parts = [part for x in contents for part in x or ()]

    def joined(texts: Iterable[str]) -> list[dict[str, Any]]:
        instead = dict(zip(odd, texts, strict=True))
        return [x | {"content": instead[i]} if i in instead else x for i, x in enumerate(messages)]

    bare = write(**given | {"messages": joined([""] * len(odd))})
    with suppress(Exception):  # of a template that takes only text
        text = write(**given)
        wanted = [part["text"].strip() for part in parts if isinstance(part.get("text"), str)]
        spelled = [form for x in contents for form in (str(x), json.dumps(x, ensure_ascii=False))]
        if all(text.count(x) > bare.count(x) for x in wanted if x) and not any(text.count(x) > bare.count(x) for x in spelled):
            return messages
    if others := [x for x in parts if x.get("type", "text") != "text" or not isinstance(x.get("text"), str)]:
        raise ValueError(f"it takes text alone, and a message has a part of type {others[0].get('type')!r}")
    return joined("".join(part["text"] for part in x or ()) for x in contents)


_WRITTEN: set[tuple[Any, ...]] = set()  # kinds of messages that were checked with a template


def _dropped(write: Callable[..., str], given: dict[str, Any], template: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The path of a value that a template does not write; of each kind of message, one is tried with each template."""
    messages = given["messages"]
    parts: list[tuple[tuple[Any, ...], Any, Any]] = [((x,), given[x], ()) for x in HANDED if x in given]
    roles = [None, *(x["role"] for x in messages), None]
    parts += [(("messages", i), x, (i == 0, *roles[i : i + 3])) for i, x in enumerate(messages)]
    for start, value, around in parts:
        leaves = [x for x in _leaves(value) if start[0] not in ("tools", "functions") or x[0][-1] in ("name", "description")]
        kinds = frozenset((*(x for x in path if isinstance(x, str)), trial) for path, trial in leaves)
        if (key := (*template, start[0], around, kinds)) in _WRITTEN:
            continue
        for path, trial in leaves:
            if not _is_written(write, given, (*start, *path), trial):
                return (*start, *path)
        _WRITTEN.add(key)
    return None


def _leaves(value: Any) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Path of each text or number, and what to try in its place; of thoughts within a text, too."""
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        yield from (((name, *path), trial) for name, x in pairs if name not in LINKS for path, trial in _leaves(x))
    elif value is not None and not isinstance(value, bool) and str(value).strip():
        yield (), SENTINEL
        if isinstance(value, str) and "</think>" in value:
            yield (), f"<think>\n{SENTINEL}\n</think>\n\nx"


def _is_written(write: Callable[..., str], given: dict[str, Any], path: tuple[Any, ...], trial: str) -> bool:
    """Whether a value is in the text; a thought, which some templates leave out of earlier turns, if its message is last."""
    changed = copy.deepcopy(given)
    place: Any = changed
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = trial
    try:
        if SENTINEL in write(**changed):
            return True
    except Exception:  # of a template that reads the value, and wants another
        return True
    if trial != SENTINEL or path[-1] in THOUGHTS:
        with suppress(Exception):  # of a template that wants the messages that follow
            return SENTINEL in write(**changed | {"messages": changed["messages"][: path[1] + 1]})
    return False


def _given(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that have a value."""
    return {name: x for name, x in row.items() if x is not None and x != "" and x != []}


def _question_name(fields: Mapping[str, Any]) -> str:
    """The field that has the question; empty if there is none."""
    both = ["prompt"] if {"prompt", "completion"} <= fields.keys() else []
    return next((x for x in (*QUESTIONS, *both) if x in fields), "")


def _question_text(asked: Asked, chat: bool, where: str) -> Text:
    question = with_choices(asked.text, asked.choices)
    if chat:
        return question_messages(asked.system, question, asked.written, where)
    return f"{zero_shot(question, asked.system)} {asked.written}"


def _conversation(turns: Any, fields: Mapping[str, Any], where: str) -> Messages:
    """Messages, or turns as ShareGPT has them, with what else in the row a template is handed."""
    turns = [_message(x, where) for x in turns] if isinstance(turns, list) else turns
    as_type(Conversation, {"messages": turns}, where)
    for i, turn in enumerate(turns):
        if turn.keys() == {"role"}:
            raise ValueError(f"{where}: Object missing required field content - at $.messages[{i}]")
    if (system := fields.get("system", fields.get("system_prompt"))) and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": as_type(str, system, f"{where}: system")})
    others = {x: fields[x] for x in HANDED if x in fields}
    others = {x: json_value(value, f"{where}: {x}") if isinstance(value, str) else value for x, value in others.items()}
    switches = as_type(dict[str, Any], fields.get("chat_template_kwargs", {}), f"{where}: chat_template_kwargs")
    return Messages.of(turns, where, **{x: value for x, value in (switches | others).items() if value})


def _message(turn: Any, where: str) -> Any:
    """A turn of ShareGPT as a message; fields that are null, apart from the content, are left out."""
    if not isinstance(turn, dict):
        return turn
    turn = {name: x for name, x in turn.items() if x is not None or name == "content"}
    if "from" not in turn:
        return turn
    speaker, content = str(turn.pop("from")), {"content": turn.pop("value")} if "value" in turn else {}
    if speaker not in ROLES:
        raise ValueError(f"{where} has a turn from {speaker[:40]!r}, expected one of {', '.join(ROLES)}")
    if speaker != "function_call":
        return {"role": ROLES[speaker], **content, **turn}
    value = content.get("content")
    calls = json_value(value, f"{where}: function_call") if isinstance(value, str) else value
    calls = [{"type": "function", "function": x} for x in (calls if isinstance(calls, list) else [calls])]
    return {"role": ROLES[speaker], "content": "", "tool_calls": calls, **turn}


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
