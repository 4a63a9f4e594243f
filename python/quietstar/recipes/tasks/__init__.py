"""Problems whose answers can be checked, most of them with a worked chain of thought: one file per kind of problem.

To add a task, subclass ``base.Task``, ``generated.Generated`` or ``question_file.QuestionFile`` and list it in
``quietstar.recipes.common.models``.
"""

from quietstar.recipes.tasks.arithmetic import Addition, Multiplication
from quietstar.recipes.tasks.base import Problem, Row, Task
from quietstar.recipes.tasks.commonsense import CommonsenseQA
from quietstar.recipes.tasks.digit_sums import DigitSums
from quietstar.recipes.tasks.gsm8k import GSM8K
from quietstar.recipes.tasks.scratchpad import Scratchpad
from quietstar.recipes.tasks.splits import SPLITS
from quietstar.recipes.tasks.stories import WordProblems
from quietstar.recipes.tasks.tokenizer import small_tokenizer

__all__ = [
    "Addition",
    "CommonsenseQA",
    "DigitSums",
    "GSM8K",
    "Multiplication",
    "Problem",
    "Row",
    "SPLITS",
    "Scratchpad",
    "Task",
    "WordProblems",
    "small_tokenizer",
]
