import math
import re
from dataclasses import fields

import pytest

from quietstar import ThoughtConfig
from quietstar.config import PRESETS, TrainConfig
from quietstar.objective import ADVANTAGES, REWARDS


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_preset_fills_what_is_not_given(preset):
    config = ThoughtConfig(preset=preset)
    assert {name: getattr(config, name) for name in PRESETS[preset]} == PRESETS[preset]
    assert ThoughtConfig(preset=preset, policy_temperature=2.0).policy_temperature == 2.0


def test_the_paper_preset_has_the_published_weights():
    """The published file lists reinforce_temperature 3 and base_loss_beta 1 before what it calls "Not used in the paper"."""
    differing = {"preset", "mixing", "reward"}
    official, paper = (ThoughtConfig(preset=name).to_dict() for name in ("official", "paper"))
    assert {name for name in official if official[name] != paper[name]} == differing
    assert (paper["policy_temperature"], paper["base_weight"]) == (3.0, 0.5)


def test_round_trip():
    config = ThoughtConfig(preset="paper", thoughts=3, base_weight=0.1)
    assert ThoughtConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown field colour"):
        ThoughtConfig.from_dict({"colour": 1})


@pytest.mark.parametrize("registry, name", [(REWARDS, "reward"), (ADVANTAGES, "advantage")])
def test_every_registered_choice_is_accepted_and_explained(registry, name):
    (help,) = (field.metadata["help"] for field in fields(ThoughtConfig) if field.name == name)
    for choice in registry:
        assert getattr(ThoughtConfig(**{name: choice}), name) == choice
        assert re.search(rf"\b{choice}: \S+ \w+", help)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thoughts": 0}, "thoughts must be 1 to 65,535, got 0"),
        ({"policy_temperature": math.nan}, "policy_temperature must be a finite number, got nan"),
        ({"embedding_init": 1.5}, "embedding_init must be an integer or text or None, got 1.5"),
        ({"preset": "best"}, "preset must be one of official, paper, small, lora, rlp, grlp, rpt, got 'best'"),
        ({"policy_temperature": 3.41e38}, r"policy_temperature must be above 0, 3.40e\+38 at most, got 3.41e\+38"),
        ({"stop_threshold": 0.5}, "end_token_id must be given where a thought stops"),
        ({"advantage": "best"}, "advantage must be one of"),
        ({"thoughts": 1, "preset": "paper"}, "thoughts must be at least 2"),
        ({"seed": -1}, "TrainConfig: seed must be 0 to .*, got -1"),
        ({"out": "\ud800"}, "TrainConfig: out must be valid Unicode"),
    ],
)
def test_a_value_out_of_range_or_of_another_type_is_named(changes, message):
    kind = TrainConfig if message.startswith("TrainConfig") else ThoughtConfig
    with pytest.raises(ValueError, match=message):
        kind(**changes)
