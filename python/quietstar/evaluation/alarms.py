"""Signs that thoughts earn their reward in a way that nobody wants, in words. docs/online.md explains the bounds."""

from __future__ import annotations

from collections.abc import Mapping

LEAKED = 0.1  # share of thoughts that have the next four tokens of the text
DEAD = 0.5  # share of anchors whose thoughts all earn the same
SHRUNK = 0.5  # of the length that thoughts had at first


def alarms(figures: Mapping[str, float], first: Mapping[str, float] | None = None) -> list[str]:
    """A sentence for each bound that figures cross.

    Args:
        figures: leak_rate, dead_groups and thought_length, as far as they are known, of some steps or of an evaluation.
        first: those of the first step; default none, so that lengths aren't compared.
    """
    said = []
    leaked, dead, length = (figures.get(name) for name in ("leak_rate", "dead_groups", "thought_length"))
    if leaked is not None and leaked > LEAKED:
        rest = figures.get("gain_without_leaks")
        without = "" if rest is None else f"; the others gain {rest:+.4f} nats"
        said.append(f"leak: {leaked:.0%} of thoughts hold the next four tokens of the text, which games the reward{without}")
    if dead is not None and dead > DEAD:
        said.append(f"dead groups: at {dead:.0%} of the anchors all thoughts earn the same, so nothing is learned from them")
    before = None if first is None else first.get("thought_length")
    if length is not None and before and length < SHRUNK * before:
        said.append(f"thoughts shrank from {before:.1f} to {length:.1f} tokens: training may turn into plain fine-tuning")
    return said
