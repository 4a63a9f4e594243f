"""Digit sums: the chain is the running sums, and their last digits alone count."""

from quietstar_recipes.tasks import DigitSums


def test_the_chain_is_the_running_sums():
    problem = DigitSums(5).problem([7, 5, 8, 6, 2])  # 7, 12, 20, 26, 28
    assert (problem.prompt, problem.chain, problem.answer) == ("7 5 8 6 2 ||", " 2 0 6 8", " 8")
    assert problem.hinted == "7 5 8 6 2 Target: 8 ||"
