"""GSM8K and CommonsenseQA from .jsonl files: prompts, hints, stop strings, splits, files that are refused."""

import json
import re

import pytest

from quietstar_recipes.common.evaluation import share_of_right_chains
from quietstar_recipes.tasks import GSM8K, SPLITS, CommonsenseQA
from quietstar_recipes.tasks.base import split_of
from tests.recipes.conftest import seeded

QUESTIONS = [
    {"question": f"Ann has {i} pens and buys {i}. How many?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(60)
]

CHOICES = {
    "question": {"stem": "Where is a fish?", "choices": [{"label": "A", "text": "a tree"}, {"label": "B", "text": "water"}]},
    "answerKey": "B",
}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_gsm8k_file(tmp_path, byte_tokenizer):
    task = GSM8K(write_lines(tmp_path / "some.jsonl", QUESTIONS), byte_tokenizer)
    rows = task.sample(1000, "train", seeded())
    assert 40 <= len(rows) < 60 and len({row.problem.prompt for row in rows}) == len(rows)
    row = next(row for row in rows if row.problem.prompt.startswith("Q: Ann has 7 pens"))
    assert byte_tokenizer.decode(row.prompt_ids) == "Q: Ann has 7 pens and buys 7. How many?\nA:"
    assert byte_tokenizer.decode(task.completion_ids(row)) == " 7 + 7 = 14\n#### 14<end>"
    assert byte_tokenizer.decode(row.hinted_ids) == "Q: Ann has 7 pens and buys 7. How many? (7 + 7 = 14 #### 14)\nA:"
    for written, right in (
        ("so the answer is 14", True),
        ("#### 14.0", True),
        ("#### 15", False),
        ("#### 15\n\n\n#### 14", False),
    ):
        assert task.check(row, byte_tokenizer(written)["input_ids"]) is right
    assert task.check_chain(row, task.completion_ids(row)) is None
    assert share_of_right_chains(task, [(row, task.completion_ids(row))]) is None


def test_what_follows_a_stop_string_is_not_trained_on(tmp_path, byte_tokenizer):
    task = GSM8K(write_lines(tmp_path / "some.jsonl", QUESTIONS), byte_tokenizer)
    ids = task.trimmed(byte_tokenizer(" #### 14\nQ: and the next?")["input_ids"])
    assert byte_tokenizer.decode(ids) == " #### 14<end>"
    cut_off = byte_tokenizer(" #### 1")["input_ids"]
    assert task.trimmed(cut_off) == cut_off and task.trimmed([*cut_off, task.end_id, 7]) == [*cut_off, task.end_id]


def test_the_test_split_of_a_folder_is_its_test_file(tmp_path, byte_tokenizer):
    write_lines(tmp_path / "train.jsonl", QUESTIONS)
    write_lines(tmp_path / "test.jsonl", [{"question": "One and one?", "answer": "#### 2"}])
    task = GSM8K(tmp_path, byte_tokenizer)
    test = task.sample(100, "test", seeded())
    assert [row.problem.right for row in test] == ["2"] and test[0].cot_ids == []
    assert len(task.sample(100, "train", seeded())) + len(task.sample(100, "valid", seeded())) == 60
    (tmp_path / "test.jsonl").rename(tmp_path / "test.json")
    task = GSM8K(tmp_path, byte_tokenizer)
    assert [row.problem.right for row in task.sample(100, "test", seeded())] == ["2"]
    assert task.files == [str(tmp_path / name) for name in ("train.jsonl", "test.json")]
    assert GSM8K(tmp_path / "*.json*", byte_tokenizer).files == sorted(task.files)
    (tmp_path / "test.json").unlink()
    with pytest.raises(ValueError, match=r"test\.jsonl: No such file"):
        GSM8K(tmp_path, byte_tokenizer)


CHAINS = {  # one problem in other forms, and its chain
    "a.txt": ("How many?||<<3+4=7>> #### 7", "<<3+4=7>>"),
    "a.json": (json.dumps([{"question": "How many?", "steps": ["<<3+4=7>>"], "answer": "7"}]), "<<3+4=7>>"),
    "a.jsonl": (json.dumps({"problem": "How many?", "solution": "so \\boxed{7}"}), "so \\boxed{7}"),
    "b.jsonl": (json.dumps({"query": "How many?", "response": "so seven", "answer": 7}), "so seven"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_of_other_data(tmp_path, byte_tokenizer, name):
    content, chain = CHAINS[name]
    (tmp_path / name).write_text(content)
    task = GSM8K(tmp_path / name, byte_tokenizer)
    (problem,) = (x for several in task.by_split.values() for x in several)
    assert (problem.prompt, problem.chain, problem.answer) == ("Q: How many?\nA:", f" {chain}", " 7")


def test_commonsense_choices_and_hint(tmp_path, byte_tokenizer):
    rows = [{**CHOICES, "rationale": "Fish swim."}] + [
        {**CHOICES, "question": {**CHOICES["question"], "stem": f"{i}?"}} for i in range(60)
    ]
    task = CommonsenseQA(write_lines(tmp_path / "some.jsonl", rows), byte_tokenizer)
    found = [row for split in SPLITS for row in task.sample(100, split, seeded())]
    row = next(row for row in found if "fish" in row.problem.prompt)
    assert row.problem.prompt == "Q: Where is a fish?\n(A) a tree\n(B) water\nA:"
    assert row.problem.hinted == "Q: Where is a fish?\n(A) a tree\n(B) water (CORRECT)\nA:"
    assert byte_tokenizer.decode(task.completion_ids(row)) == " Fish swim.\n#### (B)<end>"
    assert task.check(row, byte_tokenizer("It is (B).")["input_ids"]) and not task.check(
        row, byte_tokenizer("(A)")["input_ids"]
    )
    assert sum(bool(row.cot_ids) for row in found) == 1


def test_problems_with_chains_are_found_among_many_without(tmp_path, byte_tokenizer):
    rows = [{**CHOICES, "question": {**CHOICES["question"], "stem": f"{i}?"}} for i in range(500)]
    for row in rows[::100]:
        row["rationale"] = "Fish swim in (B), not in (A)."
    path = write_lines(tmp_path / "some.jsonl", rows)
    task = CommonsenseQA(path, byte_tokenizer)
    there = sum(split_of(f"Q: {i}?\n(A) a tree\n(B) water\nA:") == "train" for i in range(0, 500, 100))
    found = task.sample_with_chain(10, seeded())
    assert len(found) == there >= 2 and all(row.cot_ids for row in found)
    assert all(task.check(row, task.completion_ids(row)) for row in found)  # also if the chain names both choices
    assert task.sample_with_chain(2, seeded()) == found[:2]
    assert CommonsenseQA(write_lines(path, rows[1:100]), byte_tokenizer).sample_with_chain(10, seeded()) == []


@pytest.mark.parametrize(
    "rows, complaint",
    [
        ([QUESTIONS[0], {"question": "How many?"}], "line 2 has no answer"),
        ([], "there is no question in it"),
        ([{"answer": "3"}], "line 1: Object missing required field question"),
        ([{"question": "How many?", "answer": {}}], r"line 1: Expected .* got object - at \$.answer"),
        ([{"question": "How many?", "answerKey": "3"}, {}], "line 2: Object missing"),
    ],
)
def test_a_malformed_file_is_refused_with_the_line_number(tmp_path, byte_tokenizer, rows, complaint):
    path = write_lines(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: {complaint}"):
        GSM8K(path, byte_tokenizer)


def test_files_without_the_requested_problems(tmp_path, byte_tokenizer):
    with pytest.raises(ValueError, match="the split 'test' has no problem"):
        GSM8K(write_lines(tmp_path / "one.jsonl", QUESTIONS[:1]), byte_tokenizer).sample(1, "test", seeded())
    with pytest.raises(ValueError, match="has no choices"):
        CommonsenseQA(write_lines(tmp_path / "one.jsonl", QUESTIONS[:1]), byte_tokenizer)
