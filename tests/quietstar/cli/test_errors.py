"""Which errors are failures at run time, and how each is said in one line."""

import os
import warnings

import pytest
import torch

from quietstar.cli.errors import runtime_failure, short_warnings


def caught(function):
    with pytest.raises(BaseException) as error:
        function()
    return error.value


@pytest.mark.parametrize(
    "function, says",
    [
        (lambda: torch.empty(2**50), "out of memory, 4503599627370496 bytes more were needed: quietstar doctor --model says"),
        (lambda: torch.empty(2**62, 32), "out of memory: quietstar doctor --model says"),
        (lambda: bytes(2**62), "out of memory: quietstar doctor --model says"),
        (lambda: torch.ones(1).addcdiv_(torch.ones(1), torch.ones(1), value=1e300), "a number is too large for its dtype: "),
        (lambda: os.stat("nowhere/x"), "No such file or directory: nowhere/x"),
    ],
)
def test_a_failure_at_run_time_is_one_line(function, says):
    text = runtime_failure(caught(function))
    assert text.startswith(says) and "\n" not in text


def test_warnings_for_authors_of_libraries_are_left_out(recwarn):
    with short_warnings():
        warnings.warn("an option will be renamed", FutureWarning, stacklevel=1)
        warnings.warn("the steps are large", stacklevel=1)
    assert [str(each.message) for each in recwarn] == ["the steps are large"]
