"""Rows of every known shape: what they hold is in the text, or an error names it."""

import json

import pytest

from quietstar.data.rows import LINKS, chat_text, question_and_answer, row_text

CALL = {"id": "c1", "type": "function", "function": {"name": "weather_of", "arguments": {"town": "Pisa", "days": 17}}}
TOOL = {"type": "function", "function": {"name": "weather_of", "description": "how it will be", "parameters": {}}}
USER = {"role": "user", "content": "Will it rain?"}
SHAPES = {
    "text": {"text": "only this"},
    "messages": {"messages": [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Yes."}]},
    "reasoning": {"messages": [USER, {"role": "assistant", "reasoning_content": "clouds are dark", "content": "Yes."}] * 2},
    "thoughts in the content": {"messages": [USER, {"role": "assistant", "content": "<think>dark clouds</think>\n\nYes."}] * 2},
    "calls": {
        "tools": [TOOL],
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
            {"role": "assistant", "content": "No."},
        ],
    },
    "call beside content": {"messages": [USER, {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}]},
    "tools in JSON": {"tools": json.dumps([TOOL]), "messages": [USER]},
    "documents": {"documents": [{"title": "An atlas", "text": "of rivers"}], "messages": [USER]},
    "a name": {"messages": [{"role": "user", "name": "Ada", "content": "Hello"}]},
    "another role": {"messages": [USER, {"role": "developer", "content": "Answer in verse"}]},
    "parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Will it"}, {"type": "text", "text": "rain?"}]}]
    },
    "a picture": {
        "messages": [{"role": "user", "content": [{"type": "image", "url": "cat.png"}, {"type": "text", "text": "A?"}]}]
    },
    "ShareGPT": {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Will it rain?"},
            {"from": "function_call", "value": '{"name": "weather_of", "arguments": {"town": "Pisa"}}'},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "No."},
        ],
    },
    "Alpaca": {"instruction": "Translate.", "input": "ja", "output": "yes", "system": "Be brief."},
    "prompt": {"prompt": "The sky is", "completion": " blue"},
    "prompt of messages": {"prompt": [USER], "completion": [{"role": "assistant", "content": "Yes."}]},
    "query": {"query": "1 + 1?", "response": "It is two", "type": "GSM"},
    "problem": {"problem": "1 + 1?", "solution": "Clearly so", "answer": "\\frac{4}{2}"},
    "steps": {"question": "1 + 1?", "steps": ["<<1+1=2>>", "so two"], "answer": "2"},
    "choices": {
        "question": {"stem": "Where?", "choices": ["a bank", "a shop"]},
        "rationale": "money is there",
        "answerKey": "A",
    },
    "context": {"context": "It was May.", "question": "When?", "response": "May", "system_prompt": "Be brief."},
}
FIELDS = "{% if x.reasoning_content %}<think>{{ x.reasoning_content }}</think>{% endif %}"
CALLS = "{% for y in x.tool_calls or [] %}{{ y.function | tojson }}{% endfor %}"
TEMPLATES = {
    "all": "{{ tools | tojson if tools }}{{ documents | tojson if documents }}{% for x in messages %}[{{ x.role }}]{{ x.name }}"
    "{% if x.content is string %}{{ x.content }}{% else %}{% for y in x.content or [] %}{{ y.text or y.url }} {% endfor %}"
    "{% endif %}" + FIELDS + CALLS + "{% endfor %}",
    "text alone": "{% for x in messages %}[{{ x.role }}]{{ x.content + '' }}{% endfor %}",
    "spelled out": "{% for x in messages %}[{{ x.role }}]{{ x.content }}" + CALLS + "{% endfor %}",
    "no earlier thoughts": "{% for x in messages %}[{{ x.role }}]"
    "{% if loop.last %}"
    + FIELDS
    + "{{ x.content }}{% else %}{{ (x.content or '').split('</think>')[-1] }}{% endif %}{% endfor %}",
    "no thoughts": "{% for x in messages %}[{{ x.role }}]{{ x.content.split('</think>')[-1] }}{% endfor %}",
    "known roles": "{% for x in messages if x.role in ['user', 'assistant'] %}[{{ x.role }}]{{ x.content }}{% endfor %}",
}


def leaves(value, name=""):
    """The texts and numbers in a row, each with the name of its field, but not those that other fields are told by."""
    if isinstance(value, (dict, list)):
        for key, x in value.items() if isinstance(value, dict) else [(name, x) for x in value]:
            if key not in (*LINKS, "from", "parameters"):
                yield from leaves(x, key)
    elif value:
        try:
            yield from leaves(json.loads(str(value))) if name in ("tools", "value") else [(name, str(value))]
        except ValueError:
            yield name, str(value)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_dropped(byte_tokenizer, shape, template):
    byte_tokenizer.chat_template = TEMPLATES[template]
    for chat in (False, True):
        check_row(byte_tokenizer, SHAPES[shape], template, chat)


def check_row(byte_tokenizer, row, template, chat):
    try:
        text = row_text(row, "", chat, "here")
        text = text if isinstance(text, str) else chat_text(byte_tokenizer, text)
    except ValueError as error:
        assert template != "all" and str(error).startswith("here: ")
        assert "has no place for the field '" in str(error) or "refuses the messages: it takes text alone" in str(error), error
        return
    earlier = {"clouds are dark", "<think>dark clouds</think>\n\nYes."}  # which this template writes of a last message alone
    lost = {x for name, x in leaves(row) if x.strip() not in text and x not in json.dumps(text) and name != "type"}
    assert lost - (earlier if template == "no earlier thoughts" else set()) <= {"A"} and "None" not in text
    assert "'text':" not in text and '"text":' not in text.replace(json.dumps(row.get("documents")), "")


@pytest.mark.parametrize(
    "row", [{"messages": [USER]}, {"question": "a", "answer": "b"}, {"texts": "x"}, {"body": None}, {"body": 1}]
)
def test_a_field_that_is_named_is_the_one_that_is_read(row):
    with pytest.raises(ValueError, match="here has no text in a field 'body'"):
        row_text(row, "body", False, "here")
    assert row_text(row | {"body": "this"}, "body", True, "here") == "this"


@pytest.mark.parametrize(
    "row, text",
    [
        ({"text": "", "messages": None, "question": "a", "answer": "b"}, "Q: a\nA: b"),
        ({"text": None, "conversations": [], "prompt": "a", "completion": "b", "id": 3}, "ab"),
        ({"text": "this", "question": "a"}, "this"),
        ({"text": ""}, ""),
    ],
)
def test_fields_without_a_value_are_passed_over(row, text):
    assert row_text(row, "", False, "here") == text


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": None}, "in a field 'text' (it is null), no messages and no question: it has 'text'"),
        ({"messages": []}, "Expected array of length >= 1 - at $.messages"),
        ({"prompt": "a", "completion": [USER]}, "must both be text or both be messages"),
        ({"conversations": [{"from": "nobody", "value": "x"}]}, "has a turn from 'nobody'"),
        ({"conversations": [{"from": "human"}]}, "missing required field content"),
        ({"messages": [USER | {"content": 3}]}, "got int - at $.messages[0].content"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "'history'"),
        ({"question": "a", "choices": ["x", "y"], "answer": "x", "answerKey": "B"}, "two answers"),
        ({"instruction": "a"}, "no answer"),
    ],
)
def test_rows_that_are_refused(row, message):
    with pytest.raises(ValueError) as error:
        row_text(row, "", False, "here")
    assert str(error.value).startswith("here") and message in str(error.value)


def test_what_comes_before_an_answer():
    asked = question_and_answer({"problem": "a", "solution": "so \\boxed{4}", "answer": "4"}, "here")
    assert asked.written == "so \\boxed{4}" and asked.chain == asked.written and asked.answer == "4"
