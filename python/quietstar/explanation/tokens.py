"""The tokens of a report, and token ids as readable text: bytes that are not a whole character are shown as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

SAME = 0.05  # nats: an effect nearer to 0 than this counts as neither help nor harm


@dataclass(frozen=True)
class Alternative:
    """One of the likeliest tokens at a place, and its probability."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class ExplainedThought:
    """A thought and what it did to the prediction of the next token.

    Attributes:
        ids, tokens: its T tokens, or fewer where it stopped itself, as ids and as text.
        text: the same in one string.
        weight: mixing weight on the thought.
        mixed: -log p of the token with this thought, nats.
        top: the likeliest tokens with this thought, the likeliest first.
        leaks: whether it has the next four tokens of the text.
    """

    ids: list[int]
    tokens: list[str]
    text: str
    weight: float
    mixed: float
    top: list[Alternative]
    leaks: bool = False


@dataclass(frozen=True)
class ExplainedToken:
    """A token of the text, and the thoughts that the model had before it.

    Attributes:
        text: what the token adds to the text. The first parts of a character of several tokens show their bytes, as ⟨E2⟩.
        base, mixed, another: -log p of the token without thoughts, with one and with another's, nats; means over the thoughts.
            None for the first token, which nothing predicts, as are the gains.
        gain: base - mixed.
        mixing: base - another, what any thought gains.
        content: another - mixed, what its own thought gains over another's; gain = mixing + content.
        thoughts: one, or several sampled ones.
        top: the likeliest tokens without a thought, the likeliest first.
    """

    id: int
    text: str
    base: float | None
    mixed: float | None
    another: float | None
    gain: float | None
    mixing: float | None
    content: float | None
    thoughts: list[ExplainedThought]
    top: list[Alternative]

    @property
    def effect(self) -> float | None:
        """How much its own thought helped, nats: gain or content, the smaller; or hurt, the gain where that is below 0."""
        return None if self.gain is None or self.content is None else min(self.gain, max(self.content, 0.0))


UNDECODED = "\ufffd"
CHARACTER_BYTES = 4  # of the longest character in UTF-8


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A single token, with the space that it begins with; bytes as ⟨E2 82⟩ where they are no whole character."""
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
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    if all(letter in letters for letter in entry):
        return f"⟨{' '.join(f'{letters[letter]:02X}' for letter in entry)}⟩"
    return f"⟨{entry}⟩"


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
