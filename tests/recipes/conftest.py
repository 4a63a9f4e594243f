"""Small things that tests of several recipes need: runs that end in the middle, and what they leave."""

import json
import os
import signal
from contextlib import contextmanager

import pytest
import torch
from transformers.utils import logging

from quietstar.run.processes import Interrupted
from quietstar_recipes.common import branches
from quietstar_recipes.common.saving import save_model
from tests.quietstar.conftest import byte_tokenizer, solver, tiny

__all__ = ["byte_tokenizer", "solver", "tiny"]

NEVER = {"LEAST_RATIO": float("inf"), "LEAST_SAVED_PER_STEP": float("inf")}
ALWAYS = {"LEAST_RATIO": 0, "LEAST_SAVED": -(10**6), "LEAST_SAVED_PER_STEP": 0}
TIMES = ("seconds", "problems_per_second", "tokens_per_second", "speeds")

logging.disable_progress_bar()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def same(first, second):
    """Whether two models have the same weights."""
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(figures):
    """Figures without those that depend on the clock."""
    if isinstance(figures, dict):
        return {name: timeless(x) for name, x in figures.items() if name not in TIMES}
    return [timeless(x) for x in figures] if isinstance(figures, list | tuple) else figures


@pytest.fixture
def solver_folder(solver, tmp_path):
    """The solver as a checkpoint."""
    save_model(tmp_path / "solver", *solver, {})
    return tmp_path / "solver"


def one_by_one(model, prompt, completion):
    """Log-probabilities from a forward pass over this text alone."""
    with torch.no_grad():
        predicted = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return [predicted[len(prompt) + i - 1, token].item() for i, token in enumerate(completion)]


class Killed(BaseException):
    pass


@pytest.fixture
def ended(monkeypatch):
    """``with ended(owner, name, n):`` a run that SIGTERM ends in a call of ``owner.name``, after ``n`` others; or a kill."""

    @contextmanager
    def context(owner, name, n, killed=False):
        original, calls = getattr(owner, name), []

        def last(*arguments, **options):
            calls.append(name)
            if len(calls) > n and killed:
                raise Killed
            if len(calls) == n + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments, **options)

        with monkeypatch.context() as patch, pytest.raises(Killed if killed else Interrupted):
            patch.setattr(owner, name, last)
            yield

    return context


@pytest.fixture
def continues():
    """``continues(run, *endings)``: a run that ends in these contexts, and is resumed, leaves what a whole one does.

    ``run(out, resume=False, ...)`` returns a model and figures.
    """

    def check(run, *endings, **changes):
        whole, *figures = run("whole", **changes)
        for number, ending in enumerate(endings):
            with ending:
                run("ended", resume=number > 0, **changes)
        model, *again = run("ended", resume=True, **changes)
        assert timeless(again) == timeless(figures)
        assert same(model, whole)

    return check


@pytest.fixture
def both(monkeypatch):
    """``both(function)``: its results with rows that repeat what others begin with, and with that read once."""
    packed = []
    for name in ("layouts_on", "prompts_once"):
        monkeypatch.setattr(branches, name, counted(getattr(branches, name), packed))

    def run(function):
        found = []
        for settings in (NEVER, ALWAYS):
            for name, value in settings.items():
                monkeypatch.setattr(branches, name, value)
            packed.clear()
            found.append(function())
            assert bool(packed) == (settings is ALWAYS)
        return found

    return run


def counted(function, calls):
    def call(*arguments):
        calls.append(function)
        return function(*arguments)

    return call
