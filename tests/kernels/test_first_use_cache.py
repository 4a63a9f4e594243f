"""A back end that was right on an unknown GPU is recorded in a file: for which calls, until when, and if it is damaged."""

import json
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from small_calls import call

from quietstar_kernels import _dispatch, _first_use

ROOT = Path(__file__).parents[2]


def new_process(monkeypatch):
    monkeypatch.setattr(_first_use, "_found", {})


def files(tmp_path):
    return list((tmp_path / "cache/quietstar_kernels").glob("*"))


@pytest.mark.parametrize("op", _dispatch.OPS)
def test_a_right_back_end_is_tried_once(op, tries, monkeypatch, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = [call(op) for _ in range(3)]
    assert tries == [(op, "cpu")] and all(torch.equal(result, call(op, "cpu")) for result in results)
    (file,) = files(tmp_path)
    written = json.loads(file.read_text())
    assert (written["kind"], written["op"], written["backend"]) == ("Test GPU", op, "cpu") and written[
        "torch"
    ] == torch.__version__
    new_process(monkeypatch)
    call(op)
    assert len(tries) == 1


def test_another_version_is_tried_again(tries, monkeypatch):
    took_part = _first_use._took_part()
    for name in ("package", "torch", "triton"):
        for value in ("another", took_part[name]):
            new_process(monkeypatch)
            monkeypatch.setattr(_first_use, "_took_part", lambda changed={name: value}: took_part | changed)
            call("thought_decode")
    assert len(tries) == 4  # the usual one, and each of three others


def test_a_digest_tells_that_the_package_changed(monkeypatch, tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    digests = set()
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.so", "2"), ("c.txt", "3")):
        (package / name).write_text(text)
        monkeypatch.setattr(_first_use, "__file__", str(package / "_first_use.py"))
        digests.add(_first_use._took_part.__wrapped__()["package"])
    assert len(digests) == 3  # text files are not code


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"kind": "Test GPU"}', None], ids=str)
def test_a_file_that_says_something_else_is_ignored(content, tries, monkeypatch, tmp_path):
    call("thought_decode")
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    if content is None:
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(content)
    for _ in range(2):
        new_process(monkeypatch)
        call("thought_decode")
    assert files(tmp_path) == [file], "nothing half written stays"
    if content is not None:
        assert len(tries) == 2 and file.read_bytes() == whole


def no_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("where", ["a file", "no home"])
def test_a_folder_that_can_not_be_written(where, tries, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file") if where == "a file" else "")
    monkeypatch.setattr(Path, "home", no_home)
    call("thought_decode")
    call("thought_decode")
    assert len(tries) == 1 and not files(tmp_path)


PROCESS = """
import torch
from quietstar_kernels import _dispatch, _first_use, sample_token
from quietstar_kernels.testing import sample_inputs
tried, right = [], _first_use._try
_first_use.TYPES, _first_use._kind = ("cpu",), lambda device: "Test GPU"
_first_use._try = lambda *arguments: tried.append(1) or right(*arguments)
sample_token(**sample_inputs(torch.Generator(), 3), seed=0)
print(len(tried))
"""


def test_processes_share_what_they_found(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "shared")}
    run = partial(subprocess.run, [sys.executable, "-c", PROCESS], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert [run(check=True).stdout.strip() for _ in range(2)] == ["1", "0"]
