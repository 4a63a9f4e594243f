"""Problems with chains: what they look like, who is in which split, and what counts as an answer."""

import json
import re

import pytest
import torch
from transformers import AutoTokenizer

from quietstar.recipes.tasks import (
    GSM8K,
    SPLITS,
    Addition,
    CommonsenseQA,
    Multiplication,
    WordProblems,
    small_tokenizer,
    split_of,
)

GENERATED = {"multiplication": lambda: Multiplication(2), "addition": lambda: Addition(3), "stories": WordProblems}
# Lines of 4_by_4_valid.txt of Internalize_CoT_Step_by_Step (MIT).
PUBLISHED = [
    "5 6 3 2 * 7 4 3 4||5 5 5 6 1 + 0 0 6 4 9 0 ( 5 5 1 1 1 1 ) + 0 0 5 9 0 7 0 ( 5 5 6 0 2 8 0 ) + 0 0 0 0 6 4 9 0 "
    "#### 5 5 6 0 8 2 0 1",
    "6 7 3 9 * 8 9 1 7||8 0 0 5 7 + 0 4 8 3 4 8 ( 8 4 8 8 1 9 ) + 0 0 6 7 3 9 0 ( 8 4 4 6 5 8 1 ) + 0 0 0 2 3 6 5 6 "
    "#### 8 4 4 8 8 4 7 6",
]
QUESTIONS = [
    {"question": f"Ann has {i} pens and buys {i}. How many?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(60)
]
CHOICES = {
    "question": {"stem": "Where is a fish?", "choices": [{"label": "A", "text": "a tree"}, {"label": "B", "text": "water"}]},
    "answerKey": "B",
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("line", PUBLISHED)
def test_multiplication_is_written_as_in_the_published_files(line):
    operands = [int("".join(x.split())[::-1]) for x in line.split("||")[0].split("*")]
    problem = Multiplication(4).problem(*operands)
    assert problem.prompt.replace(" ||", "||") + problem.chain.strip() + " ####" + problem.answer == line


@pytest.mark.parametrize("digits, tokens", [(2, 8), (4, 46), (5, 74), (7, 148), (9, 246)])
def test_chain_lengths_are_the_published_ones(digits, tokens):
    row = Multiplication(digits).sample(1, "train", generator())[0]
    assert len(row.cot_ids) == tokens and len(row.answer_ids) == 2 * digits


def test_addition_carries():
    problem = Addition(3).problem(964, 289)  # 4+9 = 13, 6+8+1 = 15, 9+2+1 = 12
    assert problem.chain.split() == ["3", "1", "5", "1", "2", "1"]
    assert problem.right == "3521"


def test_stories_add_up():
    for row in WordProblems().sample(200, "train", generator()):
        steps = row.problem.chain.replace(" ", "").split(";")
        for step in steps:
            a, sign, b, c = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", step).groups()
            assert int(a) + int(b) * (1 if sign == "+" else -1) == int(c) >= 0
        assert steps[1].startswith(steps[0].split("=")[1]) and row.problem.right == steps[1].split("=")[1]


@pytest.mark.parametrize("name", GENERATED)
def test_solved_rows_are_right_and_others_are_not(name):
    task = GENERATED[name]()
    rows = task.sample(50, "train", generator())
    for row, other in zip(rows, rows[1:], strict=False):
        written = task.completion_ids(row)
        assert task.check(row, written) and task.check_chain(row, written)
        assert row.prompt_ids + written == task.tokenizer(task.tokenizer.decode(row.prompt_ids + written))["input_ids"]
        assert row.answer_ids not in (row.prompt_ids, row.hinted_ids) and row.hinted_ids != row.prompt_ids
        if other.problem.right != row.problem.right:
            assert not task.check(row, task.completion_ids(other))
        assert task.answer(row, row.cot_ids + [task.end_id]) is None  # no mark before the answer
        assert task.answer(row, written[:-1]) is None  # it may have gone on
        assert task.check(row, row.answer_ids[:0] + task.separator_ids + row.answer_ids + [task.end_id, 7])
        assert not task.check_chain(row, task.separator_ids + row.answer_ids + [task.end_id])


@pytest.mark.parametrize("name", GENERATED)
def test_splits_share_no_problem(name):
    task = GENERATED[name]()
    asked = {split: {row.problem.prompt for row in task.sample(400, split, generator(i))} for i, split in enumerate(SPLITS)}
    assert not asked["train"] & asked["valid"] and not asked["train"] & asked["test"] and not asked["valid"] & asked["test"]


def test_share_of_the_splits():
    task = Multiplication(2)
    found = [split_of(task.problem(a, b).prompt) for a in range(10, 100) for b in range(10, 100)]
    assert abs(found.count("test") - 810) < 90 and abs(found.count("valid") - 405) < 65  # three standard deviations


def test_the_seed_fixes_the_problems():
    task = Multiplication(3)
    first, again, other = (task.sample(5, "test", generator(seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_small_tokenizer_comes_back(tmp_path):
    tokenizer = small_tokenizer("0123")
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again("3 1 #### 2 <end>")["input_ids"] == tokenizer("3 1 #### 2 <end>")["input_ids"]
    assert again.eos_token_id == 1 and again.pad_token_id == 0


def test_gsm8k_file(tmp_path, byte_tokenizer):
    task = GSM8K(write_lines(tmp_path / "some.jsonl", QUESTIONS), byte_tokenizer)
    rows = task.sample(1000, "train", generator())
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


def test_what_follows_a_stop_text_is_not_trained_on(tmp_path, byte_tokenizer):
    task = GSM8K(write_lines(tmp_path / "some.jsonl", QUESTIONS), byte_tokenizer)
    ids = task.trimmed(byte_tokenizer(" #### 14\nQ: and the next?")["input_ids"])
    assert byte_tokenizer.decode(ids) == " #### 14<end>"
    cut_off = byte_tokenizer(" #### 1")["input_ids"]
    assert task.trimmed(cut_off) == cut_off and task.trimmed([*cut_off, task.end_id, 7]) == [*cut_off, task.end_id]


def test_a_folder_keeps_its_test_file_apart(tmp_path, byte_tokenizer):
    write_lines(tmp_path / "train.jsonl", QUESTIONS)
    write_lines(tmp_path / "test.jsonl", [{"question": "One and one?", "answer": "#### 2"}])
    task = GSM8K(tmp_path, byte_tokenizer)
    test = task.sample(100, "test", generator())
    assert [row.problem.right for row in test] == ["2"] and test[0].cot_ids == []
    assert len(task.sample(100, "train", generator())) + len(task.sample(100, "valid", generator())) == 60


def test_commonsense_choices_and_hint(tmp_path, byte_tokenizer):
    rows = [{**CHOICES, "rationale": "Fish swim."}] + [
        {**CHOICES, "question": {**CHOICES["question"], "stem": f"{i}?"}} for i in range(60)
    ]
    task = CommonsenseQA(write_lines(tmp_path / "some.jsonl", rows), byte_tokenizer)
    found = [row for split in SPLITS for row in task.sample(100, split, generator())]
    row = next(row for row in found if "fish" in row.problem.prompt)
    assert row.problem.prompt == "Q: Where is a fish?\n(A) a tree\n(B) water\nA:"
    assert row.problem.hinted == "Q: Where is a fish?\n(A) a tree\n(B) water (CORRECT)\nA:"
    assert byte_tokenizer.decode(task.completion_ids(row)) == " Fish swim.\n#### (B)<end>"
    assert task.check(row, byte_tokenizer("It is (B).")["input_ids"]) and not task.check(
        row, byte_tokenizer("(A)")["input_ids"]
    )
    assert sum(bool(row.cot_ids) for row in found) == 1


def test_solved_problems_are_found_among_many_without_chains(tmp_path, byte_tokenizer):
    rows = [{**CHOICES, "question": {**CHOICES["question"], "stem": f"{i}?"}} for i in range(500)]
    for row in rows[::100]:
        row["rationale"] = "Fish swim in (B), not in (A)."
    path = write_lines(tmp_path / "some.jsonl", rows)
    task = CommonsenseQA(path, byte_tokenizer)
    there = sum(split_of(f"Q: {i}?\n(A) a tree\n(B) water\nA:") == "train" for i in range(0, 500, 100))
    found = task.solved(10, generator())
    assert len(found) == there >= 2 and all(row.cot_ids for row in found)
    assert all(task.check(row, task.completion_ids(row)) for row in found)  # also where the chain names both
    assert task.solved(2, generator()) == found[:2]
    assert CommonsenseQA(write_lines(path, rows[1:100]), byte_tokenizer).solved(10, generator()) == []


@pytest.mark.parametrize(
    "rows, complaint",
    [
        ([QUESTIONS[0], {"question": "How many?"}], "line 2 has no answer"),
        ([], "there is no question in it"),
        ([{"answer": "3"}], "line 1 has no text in a field 'question'"),
    ],
)
def test_a_file_without_answers_is_refused_by_its_line(tmp_path, byte_tokenizer, rows, complaint):
    path = write_lines(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: {complaint}"):
        GSM8K(path, byte_tokenizer)


def test_bad_input(tmp_path, byte_tokenizer):
    with pytest.raises(ValueError, match="split must be one of train, valid, test, got 'dev'"):
        Multiplication(2).sample(1, "dev", generator())
    with pytest.raises(ValueError, match="digits must be from 1 to 18, got 0"):
        Addition(0)
    with pytest.raises(ValueError, match="the split 'test' has no problem"):
        GSM8K(write_lines(tmp_path / "one.jsonl", QUESTIONS[:1]), byte_tokenizer).sample(1, "test", generator())
    with pytest.raises(ValueError, match="has no choices"):
        CommonsenseQA(write_lines(tmp_path / "one.jsonl", QUESTIONS[:1]), byte_tokenizer)
    byte_tokenizer.eos_token = None
    with pytest.raises(ValueError, match="Multiplication: the tokenizer has no end-of-text token"):
        Multiplication(2, byte_tokenizer)
