"""Options that other options leave without effect are refused; where they have one, the same options are taken."""

import pytest

from quietstar.cli.ignored import RULES
from quietstar.cli.main import COMMANDS
from quietstar.cli.options import UsageError, parse

# A command, options of which the last is ignored, how the error ends, and what to add or replace so that it is not.
CASES = [
    ("generate", ["--think=never", "--thoughts=2"], "with --think=never", ["--think=always", "--sample-thoughts"]),
    ("generate", ["--think=never", "--sample-thoughts"], "with --think=never", ["--think=2.5"]),
    ("generate", ["--thoughts=2"], "without --sample-thoughts", ["--sample-thoughts"]),
    ("generate", ["--top-p=0.9"], "without --temperature above 0", ["--temperature=1"]),
    ("generate", ["--top-k=9"], "without --temperature above 0", ["--temperature=1"]),
    ("generate", ["--seed=1"], "without --temperature above 0 or --sample-thoughts", ["--temperature=1"]),
    ("generate", ["--seed=1"], "without --temperature above 0 or --sample-thoughts", ["--sample-thoughts"]),
    ("eval", ["--all", "--held-out=8"], "with --all", ["--no-all"]),
    ("eval", ["--all", "--held-out-seed=8"], "with --all", ["--no-all"]),
    ("eval", ["--data=a.txt", "--all", "--held-out=3"], "with --all", ["--no-all"]),
    ("explain", ["text", "--held-out=1"], "with a text", None),
    ("ask", ["--temperature=1"], "without --votes", ["--votes=3"]),
    ("ask", ["--seed=1"], "without --votes", ["--votes=3"]),
    ("ask", ["--questions-split=validation"], "with a file", ["--questions=openai/gsm8k:main"]),
    ("star", ["--task=stories", "--digits=3"], "unless --task is multiplication or addition", ["--task=addition"]),
    ("star", ["--lora-rank=0", "--lora-alpha=2"], "without --lora-rank", ["--lora-rank=2"]),
    ("star", ["--top-p=0.9"], "with --temperature=0", ["--temperature=1"]),
    ("star", ["--hint-share=0.5"], "without --sft-steps", ["--sft-steps=5"]),
    ("star", ["--no-filter", "--rationalize"], "with --no-filter", ["--filter"]),
    ("star", ["--rationale-check=chain"], "without --rationalize", ["--rationalize"]),
    ("star", ["--rationalize", "--least-likelihood=-1"], "and --rationale-check=likelihood", ["--rationale-check=likelihood"]),
    ("vstar", ["--task=stories", "--digits=3"], "unless --task is multiplication or addition", ["--task=addition"]),
    ("vstar", ["--lora-dropout=0.1"], "without --lora-rank", ["--lora-rank=2"]),
    ("vstar", ["--sft-problems=9"], "without --sft-steps", ["--sft-steps=5"]),
    ("solve", ["--attempts=0", "--revise-steps=9"], "with --attempts=0", ["--attempts=2"]),
    ("solve", ["--attempts=0", "--judge-steps=9"], "with --attempts=0", ["--attempts=2"]),
    ("solve", ["--revise-problems=9"], "without --revise-steps or --judge-steps", ["--judge-steps=5"]),
    ("solve", ["--judge-steps=5", "--revise-samples=9"], "without --revise-steps", ["--revise-steps=5"]),
    ("solve", ["--no-history"], "without --judge-steps", ["--judge-steps=5"]),
    ("solve", ["--process-verifier=v", "--process-steps=9"], "with --process-verifier", ["--process-verifier="]),
    ("solve", ["--rollouts=9"], "without --process-steps", ["--process-steps=5"]),
    ("solve", ["--beam-width=2"], "without --process-steps or --process-verifier", ["--process-verifier=v"]),
    ("solve", ["--learning-rate=1e-3"], "without --revise-steps, --judge-steps or", ["--revise-steps=5"]),
    ("solve", ["--lora-rank=2"], "or --process-steps", ["--process-steps=5"]),
    ("solve", ["--revise-steps=5", "--lora-targets=q_proj"], "without --lora-rank", ["--lora-rank=2"]),
    ("internalize", ["--method=kd", "--side=right"], "with --method=kd", ["--method=stepwise"]),
    ("internalize", ["--method=kd", "--compare"], "with --method=kd", ["--method=stepwise"]),
    ("internalize", ["--components=2"], "without --method=kd", ["--method=kd"]),
    ("internalize", ["--gate-rounds=2"], "without --gate", ["--gate=0.9"]),
    ("internalize", ["--remove-all-beyond=0", "--smoothing=1"], "with --remove-all-beyond=0", ["--remove-all-beyond=3"]),
    ("internalize", ["--remove-all-beyond=1", "--steps-per-token=1"], "is above 1", ["--remove-all-beyond=2"]),
    ("score", ["--two-turn-rate=1e-4"], "without --two-turn-steps", ["--two-turn-steps=5"]),
    ("score", ["--two-turn-problems=9"], "without --two-turn-steps", ["--two-turn-steps=5"]),
    ("score", ["--first-steps=0", "--first-kl=1"], "with --first-steps=0", ["--first-steps=1"]),
    ("score", ["--second-steps=0", "--bonus=1"], "with --second-steps=0", ["--second-steps=1"]),
    ("score", ["--first-steps=0", "--single-turn", "--bonus=1"], "with --single-turn", ["--no-single-turn"]),
    ("score", ["--first-steps=0", "--single-turn", "--credit=joint"], "with --single-turn", ["--no-single-turn"]),
    ("fast", ["--curriculum=4-2", "--later-rate=0.1"], "with a curriculum of one stage", ["--curriculum=4-2,2-1"]),
    ("fast", ["--objective=likelihood", "--plain-weight=1"], "unless --objective is sampled", ["--objective=observed"]),
    ("fast", ["--objective=distil", "--no-clamp-reward"], "unless --objective is sampled", ["--objective=sampled"]),
    ("fast", ["--thought-tokens=4"], "here: --curriculum sets it", None),
    ("fast", ["--lookahead=4"], "here: --curriculum sets it", None),
    ("train", ["--lora-targets=q_proj"], "without --lora-rank", ["--lora-rank=2"]),
    ("train", ["--held-out=1", "--eval-every=5"], "unless --held-out is 2 or more", ["--held-out=2"]),
    ("doctor", ["--model=m", "--lora-targets=q_proj"], "without --lora-rank", ["--lora-rank=2"]),
]
for name in ("train", "eval", "export", "fast"):
    CASES += [
        (name, ["--data=builtin", "--text-field=body"], "with a .txt file or the built-in text", ["--data=a.jsonl"]),
        (name, ["--data=a.jsonl", "--split=test"], "with a file or the built-in text", ["--data=name"]),
        (name, ["--hub-texts=9"], "with a file or the built-in text", ["--data=name"]),
        (name, ["--held-out=0", "--held-out-seed=3"], "with --held-out=0", ["--held-out=9"]),
    ]
for name in ("train", "fast"):
    CASES += [
        (name, ["--anchors=every", "--anchor-share=0.5"], "unless --anchors is random, entropy or gate", ["--anchors=gate"]),
        (name, ["--anchor-stride=3"], "without --anchors=every", ["--anchors=every"]),
        (name, ["--gate-cost=0.1"], "without --anchors=gate", ["--anchors=gate"]),
        (name, ["--base-model-decay=0.9"], "without --base-model=ema", ["--base-model=ema"]),
        (name, ["--reward=likelihood", "--base-model=ema"], "with --reward=likelihood, unless", ["--reward=gain"]),
    ]
for name in ("solve", "internalize", "score"):
    CASES += [(name, ["--task=stories", "--digits=3"], "unless --task is multiplication or addition", ["--task=addition"])]
CASES += [
    ("doctor", [option], "without --model", ["--model=m"])
    for option in (
        "--batch-size=2",
        "--length=9",
        "--thoughts=3",
        "--lora-rank=2",
        "--dtype=bfloat16",
        "--processes=2",
        "--verify",
    )
]
CASES += [("train", ["--eval-every=0", "--no-controls"], "with --eval-every=0", ["--eval-every=9"])]
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
    parse(COMMANDS, arguments[:-1])  # without it
    if remedy is not None:
        parse(COMMANDS, [*arguments, *remedy])


def option_of(argument):
    return argument.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")


def test_every_rule_names_options_of_its_command_and_has_a_case():
    assert set(RULES) == set(COMMANDS)
    for command in COMMANDS:
        known, tried = set(options_of(command)), {option_of(case[1][-1]) for case in CASES if case[0] == command}
        for rule in RULES[command]:
            names = set(rule.options.split())
            assert names <= known and names & tried, (command, rule)


def options_of(command):
    arguments = {"think": ["--model=m", "text"]}
    made = parse(COMMANDS, [command, *arguments.get(command, REQUIRED.get(command, ["--model=m"]))])
    for name, value in vars(made).items():
        yield from vars(value) if hasattr(value, "__dataclass_fields__") else [name]


def test_options_of_a_config_file_are_not_refused(tmp_path):
    """The config that a run writes has all options."""
    (tmp_path / "config.json").write_text('{"model": "m", "lora_rank": 0, "lora_dropout": 0.0, "anchor_stride": 4}')
    assert parse(COMMANDS, ["train", f"--config={tmp_path / 'config.json'}"]).lora.lora_dropout == 0
