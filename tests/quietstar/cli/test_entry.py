"""The command before it does anything: versions, names of commands, a shell's completion, libraries that are missing."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from quietstar import NEEDED
from quietstar.cli import entry, errors
from quietstar.cli.main import COMMANDS, COMPLETION, GROUP, main

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version(option, capsys):
    assert entry.main([option]) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and f"torch {metadata.version('torch')}" in line
    assert all(name in line for name in ("quietstar-kernels ", "triton ", "transformers ", "Python 3."))


@pytest.mark.parametrize(
    "typed, advice",
    [
        ("trian", "there is no command trian: did you mean train?"),
        ("explan", "there is no command explan: did you mean explain?"),
        ("paint", f"there is no command paint: the commands are {', '.join(COMMANDS)}"),
    ],
)
def test_a_mistyped_command_gets_a_suggestion(quietstar, typed, advice):
    assert quietstar(typed, "--model=model") == (errors.USAGE, "", [f"quietstar: {advice}"])


def test_no_command_lists_them(quietstar):
    code, _, (line,) = quietstar()
    assert code == errors.USAGE and f"name a command: {', '.join(COMMANDS)};" in line


def test_a_command_that_can_not_be_imported(quietstar, monkeypatch):
    broken = metadata.EntryPoint("paint", "no_such_package:Paint", GROUP)
    monkeypatch.setitem(COMMANDS.data, "paint", broken)
    line = "quietstar: no_such_package:Paint, of the command paint, can't be imported: No module named 'no_such_package'"
    assert quietstar("paint", "--out=x") == (errors.USAGE, "", [line])
    assert quietstar("--help")[1].count("\n  paint\n") == 1


# Imports fail as in an environment where only what the kernels need is installed.
BARE = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from quietstar.cli.entry import main
try:
    from quietstar import QuietStar
except ImportError as error:
    print(error)
sys.exit(main(sys.argv[1:]))
"""


def test_the_list_of_commands_needs_no_library():
    """Not even to be there, so it takes no time to import them."""
    command = [sys.executable, "-c", BARE.format(names={"torch", *NEEDED}), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and {"star", "vstar", "solve", "internalize", "score", "fast"} <= {*COMMANDS}
    shown = " ".join(done.stdout.split())
    assert all(f" {name} {inspect.getdoc(COMMANDS[name])}" in shown for name in COMMANDS)
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.long
def test_a_library_that_is_missing_is_named_with_its_extra():
    command = [sys.executable, "-c", BARE.format(names=NEEDED), "train"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    extra = r"needs \w+, of the train extra: pip install -e '\.\[train\]' in a checkout"
    assert done.returncode == errors.USAGE and "Traceback" not in done.stderr
    assert re.fullmatch(f"quietstar: the command {extra}", done.stderr.splitlines()[-1]), done.stderr
    assert re.fullmatch(rf"quietstar\.QuietStar {extra}\n", done.stdout)


def test_every_library_is_declared():
    text = (ROOT / "pyproject.toml").read_text()
    extra = re.search(r"^train = \[(.*?)\]$", text, re.M | re.S)[1]
    assert {"yaml" if name == "pyyaml" else name for name in re.findall(r'"(\w+)>=', extra)} == NEEDED
    optional = {"peft", "trl", "datasets", "matplotlib", "lm_eval", "bitsandbytes", "vllm", "rich", "pyarrow"}
    optional |= {"typing_extensions"}  # for type checkers alone
    ours = {"quietstar", "quietstar_kernels", "quietstar_recipes"}
    declared = {*sys.stdlib_module_names, "torch", "triton", *ours, *NEEDED, *optional}
    for path in (ROOT / "python").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [x.name for x in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert {name.partition(".")[0] for name in names} <= declared, path


COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
completion=$(complete -p quietstar); completion=${completion#*-F }
${completion% *}
echo "${COMPREPLY[@]}"
"""


@pytest.mark.long
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_a_shell_completes_commands_and_options(tmp_path, capsys):
    for shell in ("bash", "zsh", "fish"):
        assert f"--tyro-write-completion {shell} " in COMPLETION
        with pytest.raises(SystemExit) as end:
            main(["--tyro-write-completion", shell, str(tmp_path / shell)])
        assert not end.value.code
    for words, found in ((["tr"], "train"), (["train", "--policy-w"], "--policy-weight")):
        command = ["bash", "-c", COMPLETE, "bash", str(tmp_path / "bash"), "quietstar", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.stdout.split() == [found], done.stderr
