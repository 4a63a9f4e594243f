"""Problems made up one at a time."""

from __future__ import annotations

from abc import abstractmethod

import torch

from quietstar.recipes.tasks.base import Problem, Task
from quietstar.recipes.tasks.splits import split_of


class Generated(Task):
    """Problems made up one at a time; those of a split are drawn with replacement."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Problem:
        """A problem of any split."""

    def problems(self, n: int, split: str, generator: torch.Generator) -> list[Problem]:
        found: list[Problem] = []
        while len(found) < n:
            problem = self.draw(generator)
            if split_of(problem.prompt) == split:
                found.append(problem)
        return found
