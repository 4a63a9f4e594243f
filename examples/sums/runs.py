"""What is compared: which positions think, and Quiet-STaR beside its controls."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sums.task import AT_EQUALS, DIGITS


@dataclass(frozen=True)
class Setting:
    """Which positions think, and the numbers that go with it."""

    name: str
    anchors: tuple[int, ...]
    thoughts: int
    lookahead: int
    lines: int
    steps: int
    policy_weight: float


# The policy loss is a mean over all positions that think. Where only one of seven needs a thought, its weight must be larger.
EQUALS_ONLY = Setting("at =", (AT_EQUALS,), thoughts=4, lookahead=1, lines=64, steps=300, policy_weight=3)
EVERYWHERE = Setting("everywhere", tuple(range(DIGITS + 2)), thoughts=2, lookahead=2, lines=32, steps=150, policy_weight=10)


@dataclass(frozen=True)
class Run:
    """Quiet-STaR, or a control that changes one part of it.

    Attributes:
        thoughts: "own" for sampled thoughts; "pause" tokens or "random" digits in their place.
        reinforce: False sets the policy weight to 0.
        frozen: only the mixing head is trained.
        rehearsal: every step also trains on 64 lines of the pretraining text.
        embedding_scale: the start and end vectors are stored divided by this, which multiplies their learning rate.
    """

    name: str
    thoughts: str = "own"
    reinforce: bool = True
    frozen: bool = False
    rehearsal: bool = False
    embedding_scale: float = 1.0


QUIET_STAR = Run("Quiet-STaR")
FROZEN = Run("frozen model, mixing head trained", reinforce=False, frozen=True)
NO_REINFORCE = Run("no REINFORCE", reinforce=False)
NO_REINFORCE_REHEARSED = Run("no REINFORCE, with rehearsal", reinforce=False, rehearsal=True)
REHEARSED = Run("Quiet-STaR with rehearsal", rehearsal=True)
PAUSES = Run("pause tokens as thoughts", thoughts="pause", reinforce=False)
RANDOM = Run("random digits as thoughts", thoughts="random", reinforce=False)
OFFICIAL_SCALE = Run("Quiet-STaR, start and end stored at 1/100", embedding_scale=100.0)

# Controls that need no training with thoughts.
PLAIN = "plain language model, 4 times the batch"
FORCED = "untrained thoughts, w = 1"
SHUFFLED = "Quiet-STaR with another line's thoughts"

QUICK_RUNS = {replace(EVERYWHERE, steps=100): (QUIET_STAR, FROZEN)}
ALL_RUNS = {
    EQUALS_ONLY: (QUIET_STAR, FROZEN, NO_REINFORCE, NO_REINFORCE_REHEARSED, REHEARSED, PAUSES, RANDOM, OFFICIAL_SCALE),
    EVERYWHERE: (QUIET_STAR, FROZEN, NO_REINFORCE, NO_REINFORCE_REHEARSED, REHEARSED, PAUSES, RANDOM),
}
