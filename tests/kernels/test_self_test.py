"""``python -m quietstar_kernels check``: right back ends pass, wrong ones fail, and the exit codes match."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from test_sample_token import defined_draws

from quietstar_kernels import _dispatch, self_test
from quietstar_kernels.__main__ import main
from quietstar_kernels.cpu import _library
from quietstar_kernels.delta import matmul

ROOT = Path(__file__).parents[2]


def run(capsys, *arguments):
    """Exit code, and what was printed."""
    code = main(["check", "--device", "cpu", *arguments])
    return code, capsys.readouterr().out


def rows(printed):
    """(op, back end, dtype): (cases, worst, result)."""
    found = re.findall(r"^(\w+) +(\w+) +(float\d+|bfloat16) +(\d+) +(\S+) +\S+  (.*)", printed, re.MULTILINE)
    return {row[:3]: row[3:] for row in found}


@pytest.mark.kernels
def test_a_normal_run():
    command = [sys.executable, "-m", "quietstar_kernels", "check", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert ("PyTorch finds no GPU here" in done.stdout) == (not torch.cuda.is_available())
    dtypes = ("float32", "float16", "bfloat16")
    served = [op for op in _dispatch.OPS if op not in _dispatch.OF_A_LAYER or not _library.missing()]
    pairs = [(op, "reference") for op in _dispatch.OPS] + [(op, "cpu") for op in served]
    pairs += [("thought_conv", "pytorch"), ("thought_delta", "matmul"), ("thought_delta", "reference")]
    assert {*rows(done.stdout)} == {(*pair, dtype) for pair in pairs for dtype in dtypes}
    assert all(result == "ok" and 0 <= float(worst) <= 1 for _, worst, result in rows(done.stdout).values())
    assert re.search(r"^All is well, \d+ s\.$", done.stdout, re.MULTILINE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels are compiled here")
@pytest.mark.kernels
@pytest.mark.parametrize("op", _dispatch.OPS)
def test_triton_in_its_interpreter(op, capsys):
    code, printed = run(capsys, "--backend", "triton", "--op", op)
    assert code == 0 and {*rows(printed)} == {(op, "triton", "float32"), (op, "triton", "float16")}


def scaled(result):
    return 1.02 * result


def with_a_nan(result):
    result[..., -1] = torch.nan
    return result


def raising(*arguments):
    raise RuntimeError("an illegal memory access")


@pytest.mark.kernels
def test_a_wrong_back_end_fails(monkeypatch, capsys):
    monkeypatch.setattr(_dispatch.module("thought_decode", "cpu"), "thought_decode", raising)
    code, printed = run(capsys, "--op", "thought_decode")
    assert code == 1 and re.search(r"\d+ cases FAILED, \d+ s\.$", printed.strip())
    for (_, backend, _), (cases, worst, result) in rows(printed).items():
        assert (backend, worst, result) == ("cpu", ">1", f"FAILED, {cases} of {cases}:") or (backend, result) == (
            "reference",
            "ok",
        )
    assert re.search("^  layout=ThoughtLayout.*: RuntimeError: an illegal memory access", printed, re.MULTILINE)


def change_output(i, change):
    return lambda outputs: [change(x) if i == j else x for j, x in enumerate(outputs)]


@pytest.mark.parametrize(
    "op, function, wrong, says",
    [
        pytest.param(
            *("thought_attention", "thought_attention_backward", change_output(2, with_a_nan), "gradient of v: error inf"),
            marks=pytest.mark.kernels,
        ),
        ("linear_logprob", "linear_logprob", change_output(1, scaled), "output 1: error"),
        ("linear_logprob", "linear_logprob_backward", change_output(1, scaled), "gradient of weight: error"),
        ("sample_token", "sample_token", change_output(0, lambda ids: ids.roll(1)), "ids are not the reference's, row"),
        ("sample_token", "sample_token", change_output(1, scaled), "logprob: error"),
    ],
)
def test_a_wrong_output_or_gradient_fails(op, function, wrong, says, monkeypatch, capsys):
    module = _dispatch.module(op, "cpu")
    right = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *arguments: tuple(wrong(right(*arguments))))
    code, printed = run(capsys, "--backend", "cpu", "--op", op)
    assert code == 1 and "ok" not in printed.split() and says in printed


@pytest.mark.kernels
def test_a_wrong_recurrence_fails(monkeypatch, capsys):
    right = matmul.thought_delta
    monkeypatch.setattr(matmul, "thought_delta", lambda *call: tuple(map(scaled, right(*call))))
    code, printed = run(capsys, "--backend", "matmul", "--op", "thought_delta")
    assert code == 1 and "ok" not in printed.split() and "output 0: error" in printed
    assert run(capsys, "--backend", "pytorch")[0] == 0


OPTIONS = {"temperature": 0.7, "scale": 0.5, "softcap": 8.0, "banned": (3, 77)}


@pytest.mark.parametrize("vocabulary, options", [(300, {}), (300, OPTIONS), (1000, {}), (5003, {}), (5003, OPTIONS)])
def test_no_draw_of_its_cases_is_near_another(vocabulary, options):
    """So a draw that differs from the reference's is wrong, in any dtype."""
    sampled = [case.arguments for small in (True, False) for case in self_test.cases(small) if case.op == "sample_token"]
    assert vocabulary == 1000 or {"vocabulary": vocabulary, **options} in sampled
    _, margins = defined_draws(self_test.exact_inputs(64, 64, vocabulary), self_test.SEED, **options)
    assert margins.min() > 4e-5


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--device", "fpga:1"], "--device"),
        (["--device", "cuda:99"], "--device: PyTorch finds no cuda:99 here"),
        (["--device", "cpu", "--backend", "cuda"], "--backend: 'cuda' is not available: "),
        (["--backend", "fast"], "invalid choice: 'fast'"),
    ],
    ids=str,
)
def test_what_can_not_be_checked(arguments, says, capsys):
    with pytest.raises(SystemExit) as end:
        main(["check", *arguments])
    said = capsys.readouterr().err
    assert end.value.code == 2 and says in said.strip().splitlines()[-1]
