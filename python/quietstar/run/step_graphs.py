"""Forward and backward of the parts of a step, by CUDA graphs where they can be captured; see ``quietstar.hf.graphs``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from quietstar.hf.graphs import EAGER
from quietstar.model import QuietStar
from quietstar.objective import Counts
from quietstar.texts import Texts
from quietstar.thinking.forward import QuietStarOutput


class StepGraphs:
    """Runs the loss of a part and its backward, which adds to the gradients.

    A graph adds to gradients where they were when it was captured. So while there are graphs, ``zero_grad`` clears gradients in
    place; where something else replaced one, the graphs are dropped. Thoughts are sampled before, by a graph of their own.

    Args:
        loss: (model, texts, counts, seed) to loss and output; by a graph, the loss must be the output's.
        eager_because: why there can't be graphs; None if there can.
    """

    def __init__(self, qs: QuietStar, model: Any, accelerator: Accelerator, loss: Callable, eager_because: str | None):
        self.qs, self.model, self.accelerator, self.loss = qs, model, accelerator, loss
        self.graphs, self.eager_because = qs.graphs_of_steps(), eager_because
        if qs.thought_config.reward == "match":
            self.eager_because = "reward='match' reads thoughts on the host"
        self._weights = [weight for weight in qs.parameters() if weight.requires_grad]
        self._grads: list[Tensor | None] = []  # of these weights, that the graphs add to
        self._names: dict[Any, tuple[str, ...]] = {}

    def zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Clear the gradients, in place where graphs add to them."""
        self._drop_stale()
        optimizer.zero_grad(set_to_none=self.graphs is None or not self.graphs.any)

    def __call__(self, part: Texts, counts: Counts, seed: int) -> tuple[Tensor, QuietStarOutput]:
        """The loss of a part and the output it was computed from; its gradients were added."""
        run = EAGER if self.graphs is None else self.graphs.runner(self.qs, part.device, self.eager_because or self._hook())
        if run.graphs is None:
            return self._eager(part, counts, seed)
        self._drop_stale()
        part = self.qs.with_sampled(part, seed)
        inputs = {f"text {i}": x for i, x in enumerate(_tensors(part))} | vars(counts)
        key = repr(self.qs.thought_config), self.qs.training, _numbers(part)

        def body(whole: bool, **given: Tensor) -> tuple[Tensor, ...]:
            own_counts = Counts(*(given.pop(field.name) for field in fields(Counts)))
            own = iter(given.values())
            _, out = self._eager(part.map(lambda _: next(own)), own_counts, seed)
            self._names[key] = tuple(out.keys())
            return tuple(x.detach() for x in out.values())  # what stays of a forward would keep its streams

        results = run(key, body, inputs)
        self._grads = [weight.grad for weight in self._weights] if run.graphs.any else []
        out = QuietStarOutput(**dict(zip(self._names[key], results, strict=True)))
        return out.loss, out

    def _eager(self, part: Texts, counts: Counts, seed: int) -> tuple[Tensor, QuietStarOutput]:
        value, out = self.loss(self.model, part, counts, seed)
        # DDP and FSDP average over ranks, but the loss is already divided by the counts of all.
        self.accelerator.backward(value * self.accelerator.num_processes)
        return value, out

    def _drop_stale(self) -> None:
        pairs = zip(self._weights, self._grads, strict=False)  # no gradients where there is no graph
        if self.graphs is not None and any(weight.grad is not grad for weight, grad in pairs):
            self.graphs.clear()
            self._grads = []

    def _hook(self) -> str | None:
        hooked = any(weight._backward_hooks or weight._post_accumulate_grad_hooks for weight in self._weights)
        hooked |= any(module._backward_hooks or module._backward_pre_hooks for module in self.qs.modules())
        return "there are hooks of gradients, which a replay would not call" if hooked else None


def _tensors(part: Texts) -> list[Tensor]:
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    part.map(note)
    return found


def _numbers(x: Any) -> Any:
    """What a dataclass holds besides tensors, and which of them there are."""
    if is_dataclass(x):
        return tuple((name, _numbers(value)) for name, value in vars(x).items() if not name.startswith("_"))
    return x if isinstance(x, int | float | str) else type(x).__name__
