"""Checks arguments. All errors have the same form:

``thought_attention: k must have shape [B,G,M,K]=[2,4,640,64], got [2,4,512,64]``
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


class Checker:
    """Checks the arguments of one op, and that dimensions with the same letter have the same size.

    The first tensor with a letter sets its size.
    """

    def __init__(self, op: str, **sizes: int):
        self.op = op
        self.sizes = sizes

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]

    def fail(self, message: str) -> ValueError:
        return ValueError(f"{self.op}: {message}")

    def tensor(
        self,
        name: str,
        value: Tensor,
        letters: str,
        dtype: Sequence[torch.dtype] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """``letters`` are the dimensions, comma-separated, such as ``"B,G,M,K"``. Raises ValueError."""
        if not isinstance(value, Tensor):
            raise self.fail(f"{name} must be a tensor [{letters}], got {type(value).__name__}")
        keys, sizes, got = letters.split(",") if letters else [], self.sizes, value.shape
        before = len(sizes)
        if len(got) != len(keys) or tuple(map(sizes.setdefault, keys, got)) != got:
            while len(sizes) > before:
                sizes.popitem()
            known = ",".join(str(sizes.get(key, "?")) for key in keys)
            raise self.fail(f"{name} must have shape [{letters}]=[{known}], got {str(list(got)).replace(', ', ',')}")
        if dtype is not None and value.dtype not in dtype:
            raise self.fail(f"{name} must have dtype {dtype_names(dtype)}, got {dtype_names([value.dtype])}")
        if device is not None and value.device != device:
            raise self.fail(f"{name} must be on {device}, got {value.device}")

    def last_strides_one(self, **tensors: Tensor) -> None:
        for name, value in tensors.items():
            if value.stride(-1) != 1 and value.shape[-1] > 1 and value.numel():
                raise self.fail(f"{name} must have a last stride of 1, got strides {list(value.stride())}")

    def width(self, letter: str) -> None:
        if not 1 <= self.sizes[letter] <= 256:
            raise self.fail(f"head width {letter} must be from 1 to 256, got {self.sizes[letter]}")

    def head_groups(self) -> None:
        if self.sizes["G"] == 0 or self.sizes["H"] % self.sizes["G"]:
            raise self.fail(f"H must be a multiple of G, got H={self.sizes['H']}, G={self.sizes['G']}")

    def positive(self, name: str, value: float | None, zero: bool = False) -> None:
        """Accepts None and finite numbers above zero; with ``zero``, zero too."""
        if value is None:
            return
        if not (value > 0 or (zero and value == 0)) or value == float("inf"):
            raise self.fail(f"{name} must be {'zero or ' if zero else ''}a positive finite number, got {value}")

    def window(self, value: int | None) -> None:
        if value is not None and (not isinstance(value, int) or value < 1):
            raise self.fail(f"window must be None or an integer of at least 1, got {value!r}")


def check_head(
    check: Checker,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    banned: Sequence[int],
) -> list[int]:
    """Checks the arguments that the two vocabulary ops share. Returns ``banned`` sorted, without duplicates."""
    check.tensor("hidden", hidden, "R,D", FLOATS)
    check.tensor("weight", weight, "V,D", (hidden.dtype,), hidden.device)
    if bias is not None:
        check.tensor("bias", bias, "V", (hidden.dtype,), hidden.device)
    check.positive("softcap", softcap)
    if scale is not None and not abs(scale) < float("inf"):
        raise check.fail(f"scale must be finite, got {scale}")
    if check["V"] == 0:
        raise check.fail("weight must have at least one row, V=0")
    banned = sorted(set(banned))
    if not banned:
        return banned
    if not (0 <= banned[0] and banned[-1] < check["V"]):
        raise check.fail(f"banned ids must be from 0 to V-1={check['V'] - 1}, got {banned}")
    if len(banned) == check["V"]:
        raise check.fail(f"banned must leave at least one of the V={check['V']} ids")
    return banned
