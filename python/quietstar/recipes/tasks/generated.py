"""Problems made up one at a time."""

from __future__ import annotations

from abc import abstractmethod

import torch

from quietstar.recipes.tasks.base import Problem, Task
from quietstar.recipes.tasks.splits import split_of

PATIENCE = 20  # draws in vain for each known problem until there are no others: one is missed with probability exp(-20)


class Generated(Task):
    """Problems made up one at a time. Those to train on are drawn with replacement, all others are distinct."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Problem:
        """A problem of any split."""

    def problems(self, n: int, split: str, generator: torch.Generator) -> list[Problem]:
        found: list[Problem] = []
        seen: set[str] = set()  # of any split
        in_vain = 0  # draws since the last one of use; after many of them there are no more problems
        while len(found) < n and in_vain < 100 + PATIENCE * len(seen):
            problem = self.draw(generator)
            new = problem.prompt not in seen
            wanted = split_of(problem.prompt) == split and (new or split == "train")
            seen.add(problem.prompt)
            if wanted:
                found.append(problem)
            in_vain = 0 if new or wanted else in_vain + 1
        return found
