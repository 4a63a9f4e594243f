"""Options that would have no effect, because of what other options say: typed ones are refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from quietstar.cli.errors import UsageError
from quietstar.data.sources import BUILTIN, TEXT, from_hub, names


class Rule(NamedTuple):
    """When some options are ignored.

    Attributes:
        options: their names, with spaces between.
        ignored: from all options of the command to whether these have no effect.
        where: how the error ends, after "has no effect".
    """

    options: str
    ignored: Callable[[Any], bool]
    where: str


def check_ignored(rules: Sequence[Rule], options: Mapping[str, Any], typed: Collection[str]) -> None:
    """Raises UsageError for the first option that was typed and would be ignored.

    Args:
        rules: those of the command.
        options: all options of the command by name, with their values.
        typed: names of those that were typed, some of them as no_name; those of a config file don't count.
    """
    values = SimpleNamespace(**options)
    for rule in rules:
        for name in rule.options.split():
            if (name in typed or f"no_{name}" in typed) and rule.ignored(values):
                raise UsageError(f"--{name.replace('_', '-')} has no effect {rule.where}")


DATA = [
    Rule("split hub_texts held_out_split", lambda o: not any(map(from_hub, names(o.data))), "with a file or the built-in text"),
    Rule(
        "text_field chat",
        lambda o: all(x == BUILTIN or x.endswith(TEXT) for x in names(o.data)),
        "with a .txt file or the built-in text",
    ),
    Rule("held_out_seed", lambda o: o.held_out == 0, "with --held-out=0"),
]
THOUGHTS = [
    Rule(
        "anchor_share", lambda o: o.anchors not in ("random", "entropy", "gate"), "unless --anchors is random, entropy or gate"
    ),
    Rule("anchor_share", lambda o: bool(o.anchor_count) and o.anchors != "gate", "with --anchor-count above 0"),
    Rule(
        "anchor_count",
        lambda o: o.anchors not in ("random", "entropy", "sentences"),
        "unless --anchors is random, entropy or sentences",
    ),
    Rule("ratio_clip_high", lambda o: not o.ratio_clip, "without --ratio-clip"),
    Rule("lookahead_discount", lambda o: o.reward == "match", "with --reward=match"),
    Rule("embedding_scale embedding_init", lambda o: bool(o.thought_start), "with --thought-start"),
    Rule("anchor_stride", lambda o: o.anchors != "every", "without --anchors=every"),
    Rule("gate_cost", lambda o: o.anchors != "gate", "without --anchors=gate"),
    Rule("base_model_decay", lambda o: o.base_model != "ema", "without --base-model=ema"),
    Rule(
        "base_model",
        lambda o: o.reward == "likelihood" and not o.kl_weight,
        "with --reward=likelihood, unless --kl-weight is above 0",
    ),
]
LORA = [Rule("lora_targets lora_alpha lora_dropout", lambda o: not o.lora_rank, "without --lora-rank")]
