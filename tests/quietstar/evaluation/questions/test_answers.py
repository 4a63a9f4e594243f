"""Answers that are found in generated text."""

import pytest

from quietstar.evaluation.questions.answers import cut, extract, number, vote

NUMBERS = {
    "16 - 3 = 13\n#### 13": "13",
    "#### 13\nQ: 5?\n#### 14": "14",
    "#### $1,234.50": "1234.5",
    "####-7": "-7",
    "The answer is 18.": "18",
    "First 3, then the Answer: $18.00, not 20": "18",
    "The answer is 3. No, the answer is 4, of 9": "4",
    "Therefore, the answer (arabic numerals) is 70,000 dollars": "70000",
    "#### 5 so the answer is 6": "5",
    " 18": "18",
    "She has 16-3=13": "13",
    "from 5 to -2": "-2",
    "He is left with (4)-3": "3",
    "She makes 9*2 = $<<9*2=18>>18 a day": "18",
    "She makes 9*2 = $<<9*2=1": "2",
    "a half is .5": "0.5",
    "007": "7",
    "-0.0": "0",
    "1" * 40 + ".10": "1" * 40 + ".1",
    "": None,
    "no idea": None,
    "####": None,
    "٣": None,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers(text):
    assert extract(text, {}) == NUMBERS[text]


CHOICES = {"A": "a bank", "B": "the library", "C": "New York", "D": "map"}
LABELS = {
    " B": "B",
    " B\nQ: and now?": "B",
    "(C) New York": "C",
    "B. the library": "B",
    "The answer is (D).": "D",
    "The answer is B, not (A)": "B",
    "I think of A: money. So the answer: C": "C",
    "Answer is A. Wait, the answer is D": "D",
    "A big dog went to (B) and stayed": "B",
    "It must be (B), since (B) has books": "B",
    "It is (A) or (B)": None,
    "(A) has no books, and the answer is not (C).\n#### (B)": "B",
    "#### B\n#### D": "D",
    "the library.": "B",
    "\nNew York\n": "C",
    "Because of it": None,
    "B's": None,
    "E": None,
    "the answer is E": None,
    "b": None,
    "": None,
}


@pytest.mark.parametrize("text", LABELS)
def test_labels(text):
    assert extract(text, CHOICES) == LABELS[text]


def test_labels_of_digits_and_of_several_letters():
    assert extract("The answer is 2", {"1": "x", "2": "y"}) == "2"
    assert extract("12", {"1": "x", "12": "y"}) == "12"
    assert extract("The answer is (A.1)", {"A": "x", "A.1": "y"}) == "A.1"


def test_cut():
    assert cut(" 18\nQ: next\nQ: more") == " 18\n"
    assert cut("one\n\n\ntwo Q:") == "one"
    assert cut("all of it\n") == "all of it\n"
    assert cut("a|b;c", [";", "|"]) == "a" and cut("abc", []) == "abc"


@pytest.mark.parametrize("text", ["", "x", "2020/1/2", "3 or 4"])
def test_texts_without_one_number(text):
    assert number(text) is None


@pytest.mark.parametrize(
    "answers, winner",
    [
        (["3", "4", "4"], "4"),
        (["3", "4", "4", "3"], "3"),
        (["4", "3"], "4"),
        ([None, None, "5"], "5"),
        ([None, None], None),
        ([], None),
    ],
)
def test_vote(answers, winner):
    assert vote(answers) == winner
