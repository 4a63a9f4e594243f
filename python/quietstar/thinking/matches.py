"""Predictions that thoughts write down, compared with how the text goes on (RPT, arXiv 2506.08007, section 3.2)."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, pairwise
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from quietstar_kernels.checks import IGNORED

BOX = "\\boxed{"


def matches(
    thought_ids: Tensor,
    thought_lengths: Tensor,
    previous: Tensor,
    following: Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Tensor:
    r"""bool [B,P,N]: whether a thought's prediction is how the text goes on.

    The prediction is what the thought's last ``\boxed{}`` holds; its bytes must be those of the next token, or of the next
    few. Without a tokenizer it is the thought's last token, which must be the next one.

    Args:
        thought_ids: int64 [B,P,N,T].
        thought_lengths: int64 [B,P,N].
        previous: int64 [B,P], the tokens at the anchors.
        following: int64 [B,P,F], the tokens after them, -100 where there is none.
    """
    if tokenizer is None:
        last = thought_ids.gather(3, (thought_lengths - 1).clamp(min=0)[..., None])[..., 0]
        return (thought_lengths > 0) & (last == following[:, :, :1])
    found = torch.zeros_like(thought_lengths, dtype=torch.bool)
    ids, lengths, before, after = (x.tolist() for x in (thought_ids, thought_lengths, previous, following))
    B, P, N = found.shape
    for b in range(B):
        for p in range(P):
            if after[b][p][0] == IGNORED:
                continue
            thoughts = ["".join(_pieces(ids[b][p][n][: lengths[b][p][n]], tokenizer)) for n in range(N)]
            predictions = [boxed(thought) for thought in thoughts]
            if any(predictions):
                right = _continuations(before[b][p], after[b][p], tokenizer)
                for n, prediction in enumerate(predictions):
                    found[b, p, n] = prediction in right
    return found


def boxed(text: str) -> str:
    r"""What the last ``\boxed{}`` of a text holds; empty without one, or where its brace isn't closed."""
    _, _, rest = text.rpartition(BOX) if BOX in text else ("", "", "")
    depth = 1
    for i, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[:i]
    return ""


def _continuations(previous: int, following: list[int], tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The bytes of the next token, of the next two, ...; after the previous one, since some decoders drop a first space."""
    known = following[: following.index(IGNORED)] if IGNORED in following else following
    right = set(accumulate(_pieces([previous, *known], tokenizer)[1:])) - {""}
    return right if _alphabet(tokenizer) else {text for text in right if UNKNOWN not in text}


def _pieces(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The bytes of each token, a character for a byte, since a token may be a part of a character.

    Where no tokens of the tokenizer stand for bytes, the bytes that each token adds to the decoded text.
    """
    alphabet, added = _alphabet(tokenizer), tokenizer.added_tokens_decoder
    if not alphabet:
        texts = [_characters(str(tokenizer.decode(ids[:n]))) for n in range(len(ids) + 1)]
        return [after[len(before) :] for before, after in pairwise(texts)]
    tokens = [str(tokenizer.convert_ids_to_tokens(i) or "") for i in ids]
    return [
        _characters(added[i].content)
        if i in added
        else alphabet.get(token) or "".join(alphabet.get(letter) or _characters(letter) for letter in token)
        for i, token in zip(ids, tokens, strict=True)
    ]


def _characters(text: str) -> str:
    return text.encode("utf-8", "surrogatepass").decode("latin-1")


# What decoders write for bytes that are no text.
UNKNOWN = _characters("\N{REPLACEMENT CHARACTER}")


@lru_cache(4)
def _alphabet(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What letters and tokens stand for bytes: those of GPT-2, ByT5 or SentencePiece; empty if none do."""
    for written in (
        {letter: chr(i) for i, letter in bytes_to_unicode().items()},
        {chr(i): chr(i) for i in range(256)},
        {f"<0x{i:02X}>": chr(i) for i in range(256)} | {"\u2581": " "},
    ):
        by_byte = {byte: name for name, byte in written.items() if name != "\u2581"}
        tokens = [by_byte[byte] for byte in _characters("a \u00e9")]
        known = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
        if (
            None not in known
            and tokenizer.unk_token_id not in known
            and str(tokenizer.decode(cast("list[int]", known))) == "a \u00e9"
        ):
            return written
    return {}
