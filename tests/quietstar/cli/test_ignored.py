"""Options that other options leave without effect are refused; where they have one, the same options are taken."""

import pytest

from quietstar.cli.errors import UsageError
from quietstar.cli.main import COMMANDS
from quietstar.cli.options import parse

# A command, options of which the last is ignored, how the error ends, and what to add or replace so that it is not.
CASES = [
    ("generate", ["--think=never", "--sample-thoughts"], "with --think=never", ["--think=2.5"]),
    ("generate", ["--thoughts=2"], "without --sample-thoughts", ["--sample-thoughts"]),
    ("generate", ["--seed=1"], "without --temperature above 0 or --sample-thoughts", ["--temperature=1"]),
    ("eval", ["--all", "--held-out=8"], "with --all", ["--no-all"]),
    ("explain", ["text", "--held-out=1"], "with a text", None),
    ("explain", ["--chat"], "without a text", ["text"]),
    ("train", ["--data=a.txt", "--chat"], "with a .txt file or the built-in text", ["--data=a.jsonl"]),
    ("ask", ["--temperature=1"], "without --votes", ["--votes=3"]),
    ("export", ["--data=builtin", "--text-field=body"], "with a .txt file or the built-in text", ["--data=a.jsonl"]),
    ("export", ["--min-gain=0.1"], "without --keep", ["--keep=1"]),
    ("eval", ["--data=a.jsonl", "--split=test"], "with a file or the built-in text", ["--data=name"]),
    ("train", ["--held-out=0", "--held-out-seed=3"], "with --held-out=0", ["--held-out=9"]),
    ("train", ["--anchors=every", "--anchor-share=0.5"], "unless --anchors is random, entropy or gate", ["--anchors=gate"]),
    ("train", ["--base-model-decay=0.9"], "without --base-model=ema", ["--base-model=ema"]),
    ("train", ["--reward=likelihood", "--base-model=ema"], "with --reward=likelihood, unless", ["--reward=gain"]),
    ("train", ["--lora-targets=q_proj"], "without --lora-rank", ["--lora-rank=2"]),
    ("train", ["--held-out=1", "--eval-every=5"], "unless --held-out is 2 or more", ["--held-out=2"]),
    ("doctor", ["--batch-size=2"], "without --model", ["--model=m"]),
    ("star", ["--no-filter", "--rationalize"], "with --no-filter", ["--filter"]),
    ("star", ["--task=stories", "--digits=3"], "with --task=stories, gsm8k or csqa", ["--task=sums"]),
    ("solve", ["--process-verifier=v", "--process-steps=9"], "with --process-verifier", ["--process-verifier="]),
    ("internalize", ["--method=kd", "--eval-every=9"], "with --method=kd", ["--method=stepwise"]),
    ("internalize", ["--method=kd", "--side=right"], "with --method=kd", ["--method=stepwise"]),
    ("score", ["--first-steps=0", "--single-turn", "--bonus=1"], "with --single-turn", ["--no-single-turn"]),
    ("fast", ["--objective=distil", "--no-clamp-reward"], "unless --objective is sampled", ["--objective=sampled"]),
]
REQUIRED = {
    "generate": ["--model=m", "--prompt=a"],
    "ask": ["--model=m", "--questions=q.jsonl"],
    "export": ["--model=m", "--out=a.jsonl"],
    "doctor": [],
}


@pytest.mark.parametrize("command, options, where, remedy", CASES, ids=lambda x: " ".join(x) if isinstance(x, list) else None)
def test_an_option_without_effect_is_refused(command, options, where, remedy):
    arguments = [command, *REQUIRED.get(command, ["--model=m"]), *options]
    with pytest.raises(UsageError) as error:
        parse(COMMANDS, arguments)
    option = option_of(options[-1]).replace("_", "-")
    assert str(error.value).startswith(f"--{option} has no effect ") and where in str(error.value)
    parse(COMMANDS, arguments[:-1] if remedy is None else [*arguments, *remedy])


def option_of(argument):
    return argument.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")


def test_every_rule_names_options_of_its_command():
    for command in COMMANDS:
        known = set(options_of(command))
        for rule in getattr(COMMANDS[command], "ignored", ()):
            assert set(rule.options.split()) <= known, (command, rule)


def options_of(command):
    arguments = {"think": ["--model=m", "text"]}
    made = parse(COMMANDS, [command, *arguments.get(command, REQUIRED.get(command, ["--model=m"]))])
    for name, value in vars(made).items():
        yield from vars(value) if hasattr(value, "__dataclass_fields__") else [name]


def test_options_of_a_config_file_are_not_refused(tmp_path):
    """The config that a run writes has all options."""
    (tmp_path / "config.json").write_text('{"model": "m", "lora_rank": 0, "lora_dropout": 0.0, "anchor_stride": 4}')
    assert parse(COMMANDS, ["train", f"--config={tmp_path / 'config.json'}"]).lora.lora_dropout == 0
