"""What was typed, and config files."""

import pytest

from quietstar.cli.errors import UsageError
from quietstar.cli.main import COMMANDS
from quietstar.cli.options import parse


def test_resume_alone_is_auto():
    for command in ("train", "star", "fast"):
        assert parse(COMMANDS, [command, "--model=m", "--resume"]).resume == "auto"
        assert parse(COMMANDS, [command, "--model=m", "--resume", "--out=a"]).resume == "auto"
    with pytest.raises(SystemExit):  # a recipe continues the run of --out, and no other checkpoint
        parse(COMMANDS, ["star", "--model=m", "--resume=runs/other"])


def test_the_last_of_several_config_files_wins_and_typed_options_win_over_all(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("model: m\ndata: t.txt\nseed: 7\nthought-tokens: 3\nsteps: 5\nprecision: no\n")
    two.write_text("steps: 6\nbatch_size: 2\ncontrols: no\nout: o\n")
    files = [f"--config={one}", "--config", str(two)]
    command = parse(COMMANDS, ["train", *files, "--batch-size=3"])
    assert (command.train.seed, command.thoughts.thought_tokens, command.train.steps) == (7, 3, 6)
    assert (command.train.batch_size, command.train.precision, command.controls) == (3, "no", False)
    assert command.train.out == "o"
    assert parse(COMMANDS, ["train", *reversed(files[:1]), "--seed=1"]).train.seed == 1
    assert parse(COMMANDS, ["train", f"--config={two}", f"--config={one}"]).train.steps == 5


WRONG_FILES = {
    "seed: 1\nseed: 2": r"c.yaml: not YAML: line 2 has seed a second time",
    '{"seed": 1, "seed": 1}': r"c.yaml: not YAML: line 1 has seed a second time",
    "steps: 1\nseed: 010": r"c.yaml: not YAML: line 2 has 010, in base 8",
    "sede: 1": r"quietstar train has no option 'sede', which .*c.yaml has: did you mean --seed\? quietstar train --help",
    "colour: red": r"quietstar train has no option 'colour', which .*c.yaml has: quietstar train --help",
}


@pytest.mark.parametrize("text", WRONG_FILES)
def test_config_files_that_are_refused(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError, match=WRONG_FILES[text]):
        parse(COMMANDS, ["train", "--model=m", "--data=t.txt", f"--config={tmp_path / 'c.yaml'}"])


@pytest.mark.parametrize(
    "command, typed, advice",
    [
        ("eval", "--limit", "quietstar eval --help"),
        ("train", "--lenght=5", r"did you mean --length\? quietstar train --help"),
        ("train", "--no-contrls", r"did you mean --controls\? quietstar train --help"),
        ("star", "--ronds", r"did you mean --rounds\? quietstar star --help"),
    ],
)
def test_a_wrong_option_names_the_commands_help(command, typed, advice):
    with pytest.raises(UsageError, match=f"quietstar {command} has no option {typed.partition('=')[0]}: {advice}"):
        parse(COMMANDS, [command, "--model=m", "--data=t.txt", typed, "4"])


def test_an_option_that_is_given_twice(capsys):
    command = parse(COMMANDS, ["train", "--model=m", "--data=t", "--seed=1", "--out", "a", "--out", "b", "--seed", "1"])
    assert command.train.out == "b" and capsys.readouterr().out == "--out was given twice: b counts, not a\n"


def test_several_data_are_all_read():
    for typed in (["--data", "a.txt", "--data=b.txt"], ["--data=a.txt,b.txt"]):
        command = parse(COMMANDS, ["train", *typed[:2], "--model=m", *typed[2:]])
        assert (command.data.data, command.model) == ("a.txt,b.txt", "m")
