"""The marks that separate the parts of a problem as text."""

from quietstar.evaluation.questions.reading import MARK

__all__ = ["AGAIN", "CHAIN_MARK", "MARK", "TARGET"]  # MARK precedes the answer

CHAIN_MARK = "||"  # between a generated problem and its chain, as in the published multiplication files
TARGET = "Target:"  # precedes the answer where a prompt gives it as a hint
AGAIN = "again"  # follows a solution, to ask for another one
