"""Question files of every format, and the errors for bad ones."""

import json
import sys
import types

import pytest

from quietstar.evaluation.questions.reading import Question, read_questions

LETTERS = {"A": "bank", "B": "library", "C": "store"}
FORMS = {
    "GSM8K": ({"question": "How many? ", "answer": "2+2=<<2+2=4>>4\n#### 1,004"}, Question("How many?", {}, "1004", "1,004")),
    "a value": ({"question": "How many?", "answer": "-3.50"}, Question("How many?", {}, "-3.5", "-3.50")),
    "a JSON number": ({"question": "How many?", "answer": 12}, Question("How many?", {}, "12", "12")),
    "CommonsenseQA": (
        {
            "answerKey": "B",
            "id": "x",
            "question": {"stem": "Where?", "choices": [{"label": x, "text": LETTERS[x]} for x in LETTERS]},
        },
        Question("Where?", LETTERS, "B", "B"),
    ),
    "the hub's": (
        {"question": "Where?", "choices": {"label": list(LETTERS), "text": list(LETTERS.values())}, "answerKey": "C"},
        Question("Where?", LETTERS, "C", "C"),
    ),
    "a place": ({"question": "Where?", "choices": list(LETTERS.values()), "answer": 0}, Question("Where?", LETTERS, "A", "A")),
    "a label": (
        {"question": "Where?", "choices": list(LETTERS.values()), "answer": "B"},
        Question("Where?", LETTERS, "B", "B"),
    ),
    "a text": (
        {"question": "Where?", "choices": list(LETTERS.values()), "answer": "store"},
        Question("Where?", LETTERS, "C", "C"),
    ),
    "numbered": (
        {"question": "Where?", "choices": {"label": ["1", "2"], "text": ["x", "y"]}, "answerKey": 2},
        Question("Where?", {"1": "x", "2": "y"}, "2", "2"),
    ),
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("form", FORMS)
def test_formats(tmp_path, form):
    row, question = FORMS[form]
    assert read_questions(write(tmp_path / "q.jsonl", [row])) == [question]


def test_order_and_limit(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"question": f"q{i}", "answer": i} for i in range(5)] + [{"broken": 1}])
    assert [x.text for x in read_questions(path, limit=3)] == ["q0", "q1", "q2"]


CHOICE = {"question": "Where?", "choices": ["x", "y"]}
BAD = {
    "empty": ("", "there is no question in it"),
    "not JSON": ('{"question": "a", "answer": 1}\n{"quest', "line 2 is not JSON"),
    "no answer": (
        '{"question": "a", "answer": 1}\n\n{"question": "b"}',
        "line 3 has no answer in a field 'answer' or 'answerKey'",
    ),
    "no number": (
        '{"question": "a", "answer": "#### unknown"}',
        "line 1 has no choices, so its answer must be a number, got 'unknown'",
    ),
    "one choice": (json.dumps(CHOICE | {"choices": ["x"], "answer": 0}), "must have two choices or more"),
    "a label twice": (
        json.dumps(CHOICE | {"choices": {"label": ["A", "A"], "text": ["x", "y"]}, "answer": "A"}),
        "two choices or more, with different labels",
    ),
    "no such choice": (json.dumps(CHOICE | {"answer": "z"}), "line 1 has the answer 'z', and its choices are A, B"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, case):
    content, message = BAD[case]
    path = tmp_path / "no.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        read_questions(str(path))
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_bad_row_of_the_hub(monkeypatch):
    fake = types.SimpleNamespace(load_dataset=lambda *names, **options: iter([{"text": "x"}]))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(ValueError, match="some/data: row 1: Object missing required field question"):
        read_questions("some/data")
