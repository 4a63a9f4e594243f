"""Token ids as readable text: what each token adds to a text; bytes that are not a whole character are shown as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from transformers import PreTrainedTokenizerBase

UNDECODED = "\ufffd"
CHARACTER_BYTES = 4  # of the longest character in UTF-8


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token alone, with the space that it begins with; bytes as ⟨E2 82⟩ where they are no whole character."""
    before = _decode(tokenizer, [token])
    # SentencePiece drops the first space of a text, so a token shows its own only after another token.
    doubled = _decode(tokenizer, [token, token])
    text = doubled[len(before) :] if doubled.startswith(before) and doubled.endswith(before) else before
    return text if text and UNDECODED not in text else raw_token(tokenizer, token)


def text_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text. A character of several tokens counts to the last; the others show their bytes."""
    pieces = []
    known = start = 0  # ids up to ``known`` are text already; decoding continues from ``start``
    for i, token in enumerate(ids):
        before, text = _decode(tokenizer, ids[start:known]), _decode(tokenizer, ids[start : i + 1])
        added = text[len(before) :] if text.startswith(before) else ""
        if i - known < CHARACTER_BYTES - 1 and (not added or text.endswith(UNDECODED)):
            pieces.append(raw_token(tokenizer, token))
            continue
        pieces.append(added if added and UNDECODED not in added else token_text(tokenizer, token))
        start, known = known, i + 1
    return pieces


def raw_token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The vocabulary's own entry, in angle brackets; as hexadecimal where it is a byte."""
    entry = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
    if not isinstance(entry, str) or not entry:
        return f"⟨id {token}⟩"
    if entry.startswith("<0x") and entry.endswith(">"):
        return f"⟨{entry[3:-1]}⟩"
    letters = _byte_letters()
    if all(letter in letters for letter in entry):
        return f"⟨{' '.join(f'{letters[letter]:02X}' for letter in entry)}⟩"
    return f"⟨{entry}⟩"


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


@cache
def _byte_letters() -> dict[str, int]:
    """The letters in which byte-level vocabularies write bytes: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
