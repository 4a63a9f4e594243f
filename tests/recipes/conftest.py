"""A signal in the middle of a run."""

import os
import signal
from contextlib import contextmanager

import pytest
from transformers.utils import logging

from quietstar.run.processes import Interrupted
from tests.quietstar.conftest import byte_tokenizer, solver, tiny

__all__ = ["byte_tokenizer", "solver", "stopped", "tiny"]

logging.disable_progress_bar()


@pytest.fixture
def stopped(monkeypatch):
    """``with stopped(owner, name, n):`` a run that SIGTERM ends during a call of ``owner.name``, after ``n`` others."""

    @contextmanager
    def context(owner, name, n):
        original, calls = getattr(owner, name), []

        def terminated(*arguments, **options):
            calls.append(name)
            if len(calls) == n + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments, **options)

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(owner, name, terminated)
            yield

    return context
