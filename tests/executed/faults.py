"""Mistakes put into the Triton kernels by hand, to see which tool finds which: a checker that finds nothing proves little."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ATTENTION = (
    "tests/kernels/test_thought_attention.py::test_error_rule_on_random_layouts[triton-ragged-0]",
    "tests/kernels/test_thought_attention.py::test_error_rule_on_random_layouts[triton-packed-2]",
    "tests/kernels/test_thought_attention.py::test_error_rule_at_other_head_groups[triton-7-19]",
    "tests/kernels/test_thought_attention.py::test_error_rule_on_longer_texts[triton-0]",
)
DECODE = (
    "tests/kernels/test_thought_decode.py::test_error_rule_on_random_layouts[triton-2]",
    "tests/kernels/test_thought_decode.py::test_error_rule_on_longer_texts[triton]",
)
HEAD = (
    "tests/kernels/test_linear_logprob.py::test_error_rule[triton-{'banned': (3, 7, 11)}-kept-(67, 17, 129)-torch.float16]",
    "tests/kernels/test_sample_token.py::test_draws_are_those_of_the_definition[triton-{}-129]",
)


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new`` in a file of quietstar_kernels/triton; ``cases`` are what is run then."""

    what: str
    file: str
    old: str
    new: str
    cases: tuple[str, ...] = ATTENTION

    @property
    def op(self) -> str:
        """The one whose kernels are compiled."""
        return "thought_attention" if self.file == "_device.py" else self.file.split("/")[0].removesuffix(".py")


FAULTS = (
    Fault(
        "a store without its mask",
        "thought_attention/forward.py",
        "row, natural, mask=inside)",
        "row, natural)",
    ),
    Fault(
        "a store one row too far",
        "thought_attention/forward.py",
        "* rows + row, natural",
        "* rows + row + 1, natural",
    ),
    Fault(
        "a load without its mask",
        "thought_attention/forward.py",
        "tl.load(layout.lo + n, mask=n < sizes.L, other=0)",
        "tl.load(layout.lo + n)",
    ),
    Fault(
        "a mask without what fills the rest",
        "_device.py",
        "mask=mask, other=0.0)",
        "mask=mask)",
    ),
    Fault(
        "keys' stride for the values",
        "thought_attention/forward.py",
        "load_rows(v_tiles, keys.v, keys.b, keys.g, n0, keys.stride_v,",
        "load_rows(v_tiles, keys.v, keys.b, keys.g, n0, keys.stride_k,",
    ),
    Fault(
        "a row sees one key too many",
        "_device.py",
        "< count.to(tl.uint32, bitcast=True)",
        "<= count.to(tl.uint32, bitcast=True)",
    ),
    Fault(
        "the sum isn't rescaled for a new maximum",
        "_device.py",
        "acc * decay[:, None]",
        "acc",
    ),
    Fault(
        "a pair of batch row and head twice, another never",
        "_device.py",
        "return first + turn % among, turn // among",
        "return first + turn % tl.maximum(among - 1, 1), turn // among",
    ),
    Fault(
        "programs that write the same rows",
        "thought_attention/backward_keys.py",
        "(part * (B * G) + pair).to(tl.int64) * end",
        "(part * (B * G) + b).to(tl.int64) * end",
    ),
    Fault(
        "a table that nobody writes",
        "thought_attention/backward.py",
        "tl.store(tables.own_count + at, tl.where(on, seen.own_last - seen.own_first + 1, 0), mask=inside)",
        "pass",
    ),
    Fault(
        "weights rounded to 16 bit before they are summed",
        "_device.py",
        "total * decay + tl.sum(p, 1)",
        "total * decay + tl.sum(p.to(tl.float16).to(tl.float32), 1)",
    ),
    Fault(
        "a division by zero",
        "thought_decode.py",
        "divide(j * BLOCK_EDGE, i, tl.maximum(own, 1))",
        "divide(j * BLOCK_EDGE, i, own - own)",
        DECODE,
    ),
    Fault(
        "a part of the text whose sum is never stored",
        "thought_decode.py",
        "tl.store(parts + rows + row, total, mask=inside)",
        "pass",
        ("tests/executed/each_kernel.py::test_decode[in parts]",),
    ),
    Fault(
        "offsets of rows in 32 bits",
        "thought_decode.py",
        "return index.to(tl.int64) * stride",
        "return index * stride",
        ("tests/kernels/test_thought_decode.py::test_tensors_of_more_than_32_bits[triton]", *DECODE),
    ),
    Fault(
        "a banned id counts",
        "linear_logprob.py",
        "shift[token : token + 1].fill_(-math.inf)",
        "pass",
        HEAD,
    ),
)


def with_fault(fault: Fault, folder: Path) -> Path:
    """A copy of the packages and tests with the fault."""
    if folder.exists():
        if others := {path.name for path in folder.iterdir()} - {"quietstar_kernels", "tests", "pyproject.toml"}:
            raise ValueError(f"{folder}: it holds {sorted(others)}, which are no copy of an earlier run: take another --out")
        shutil.rmtree(folder)
    for name in ("quietstar_kernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    path = folder / "quietstar_kernels/triton" / fault.file
    text = path.read_text()
    if fault.old not in text:
        raise ValueError(f"{fault.file} has no {fault.old!r} any more, for the fault {fault.what!r}")
    path.write_text(text.replace(fault.old, fault.new))
    ahead = folder / "tests/kernels/test_ahead_of_time.py"  # of all variants, heads of 128 in 16 bit take a third of the time
    ahead.write_text(ahead.read_text().replace('"sm_90": "thorough"', '"sm_90": "brief"'))
    return folder
