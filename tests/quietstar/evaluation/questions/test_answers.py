"""Answers that are found in generated text."""

import pytest

from quietstar.evaluation.questions.answers import cut, extract, is_formula, number, vote, written_answer

NUMBERS = {
    "16 - 3 = 13\n#### 13": "13",
    "#### $1,234.50": "1234.5",
    "First 3, then the Answer: $18.00, not 20": "18",
    "The answer is 3. No, the answer is 4, of 9": "4",
    "Therefore, the answer (arabic numerals) is 70,000 dollars": "70000",
    "#### 5 so the answer is 6": "5",
    "She has 16-3=13": "13",
    "from 5 to -2": "-2",
    "He is left with (4)-3": "3",
    "She makes 9*2 = $<<9*2=18>>18 a day": "18",
    "She makes 9*2 = $<<9*2=1": "2",
    "-0.0": "0",
    "1" * 40 + ".10": "1" * 40 + ".1",
    "The answer is x = \\frac{2}{6}": "1/3",
    "so $\\boxed{-\\dfrac{3}{4}}$, of 9": "-0.75",
    "\\boxed{\\text{5 cm}^2} or 6": "5",
    "**Answer:** **1,234.50**": "1234.5",
    "2**3 and 3/4/2020": "2020",
    "#### 0 7 1": "071",
    "1/0": "1/0",
    "no idea": None,
    "٣": None,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers(text):
    assert extract(text, {}) == NUMBERS[text]


CHOICES = {"A": "a bank", "B": "the library", "C": "New York", "D": "map"}
LABELS = {
    " B": "B",
    "(C) New York": "C",
    "B. the library": "B",
    "The answer is B, not (A)": "B",
    "I think of A: money. So the answer: C": "C",
    "A big dog went to (B) and stayed": "B",
    "It must be (B), since (B) has books": "B",
    "(A) has no books, and the answer is not (C).\n#### (B)": "B",
    "#### B\n#### D": "D",
    "the library.": "B",
    "\nNew York\n": "C",
    "**B**": "B",
    "$\\boxed{\\text{(B)}}$": "B",
    "The correct option is **B**.": "B",
    "So the answer is option $B$": "B",
    "The best choice is (B)": "B",
    "Because of it": None,
    "B's": None,
    "the answer is E": None,
    "b": None,
}


@pytest.mark.parametrize("text", LABELS)
def test_labels(text):
    assert extract(text, CHOICES) == LABELS[text]


FORMS = ["{}", "{} km", "${}$", "**{}**", "\\boxed{{{}}}", "x = {}", "The answer is {}.", "#### {}", "\\({}\\)", "{}\\%"]


@pytest.mark.parametrize(
    "same",
    [
        ["1,000", "1000", "1000.0", "1e3", "1{,}000", "2000/2"],
        ["-1/2", "\u22120.5", "-\\frac{1}{2}", "-\\frac12", "-5e-1"],
        ["2/3"],
    ],
)
def test_a_number_is_the_same_in_every_form_on_both_sides(same):
    texts = [form.format(x) for form in FORMS for x in same]
    found = {number(written_answer(text)) for text in texts} | {extract(text, {}) for text in texts}
    assert found == {number(same[0])} != {None}


@pytest.mark.parametrize("text", ["\\sqrt{3}", "2\\pi", "x^2", "(3,4)", "2\\sqrt{3}", "\u03c0/2"])
def test_a_formula_is_no_number(text):
    assert number(text) is None


def test_formulas_by_math_verify():
    pytest.importorskip("math_verify")
    assert is_formula("\\sqrt{3}") and not is_formula("no number")
    assert extract("So it is $\\boxed{1+x^2}$", {}, "x^2+1") == "x^2+1" and extract("about 1.73", {}, "\\sqrt{3}") == "1.73"


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
