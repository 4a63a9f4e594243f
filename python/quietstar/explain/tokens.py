"""The entries of a report."""

from __future__ import annotations

from dataclasses import dataclass

SAME = 0.05  # nats: a gain of content nearer to 0 than this counts as neither help nor harm


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
    """

    ids: list[int]
    tokens: list[str]
    text: str
    weight: float
    mixed: float
    top: list[Alternative]


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
