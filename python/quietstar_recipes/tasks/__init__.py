"""Problems whose answers can be checked, most of them with a worked chain of thought.

To add a task, subclass ``base.Task``, ``generated.Generated`` or ``files.QuestionFile`` and list it in
``quietstar_recipes.common.models``.
"""

from quietstar_recipes.tasks.base import SPLITS, Problem, Row, Task, small_tokenizer
from quietstar_recipes.tasks.files import GSM8K, CommonsenseQA
from quietstar_recipes.tasks.generated import Addition, DigitSums, Multiplication, Scratchpad, WordProblems

__all__ = [
    "GSM8K",
    "SPLITS",
    "Addition",
    "CommonsenseQA",
    "DigitSums",
    "Multiplication",
    "Problem",
    "Row",
    "Scratchpad",
    "Task",
    "WordProblems",
    "small_tokenizer",
]
