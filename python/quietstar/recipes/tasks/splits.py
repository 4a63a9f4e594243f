"""The splits train, valid and test. A hash of the problem decides, so that they never overlap."""

from __future__ import annotations

import hashlib

SPLITS = ("train", "valid", "test")
TEST, VALID = 0.10, 0.05  # shares of the problems


def split_of(prompt: str) -> str:
    """The split that a problem belongs to, from a hash of its prompt."""
    share = int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big") / 2**64
    return "test" if share < TEST else "valid" if share < TEST + VALID else "train"
