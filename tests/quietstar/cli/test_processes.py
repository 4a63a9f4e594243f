"""A reader that goes away, a disk that is full, and a locale that is not UTF-8."""

import io
import os
import subprocess
import sys

import pytest

from quietstar import QuietStar, ThoughtConfig
from quietstar.cli import errors
from quietstar.cli.main import main

C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
THINK = ["think", "--model=thinker", "Hi there"]


@pytest.fixture
def thinker(home, tiny, byte_tokenizer):
    model = tiny("llama", vocab_size=257, hidden_size=32, intermediate_size=48)
    QuietStar(model, ThoughtConfig(thoughts=1, thought_tokens=2, lookahead=2), byte_tokenizer).save_pretrained("thinker")
    (home / "gruesse.txt").write_text("".join(f"Grüße {i}, 你好, 🙂.\n\n" for i in range(40)), encoding="utf-8")


@pytest.mark.parametrize("buffer", [1, -1])
def test_a_reader_that_goes_away_ends_a_command_silently(thinker, monkeypatch, capsys, buffer):
    """As in ``quietstar think ... | head``: while it prints, or when what it printed is written at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=buffer) as stdout:  # that it closes without an error is a part of the test
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(THINK) == errors.PIPE
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_to_a_full_disk_is_a_sentence(thinker, monkeypatch, capsys):
    with open("/dev/full", "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(THINK) == errors.RUNTIME
        monkeypatch.undo()
    assert capsys.readouterr().err == "quietstar: the output can't be written: No space left on device\n"


@pytest.mark.parametrize("arguments", [THINK, ["generate", "--model=thinker", "--prompt=Hi", "--max-new-tokens=20"]])
def test_characters_that_the_terminal_lacks_are_escaped(thinker, monkeypatch, arguments):
    printed = io.BytesIO()
    with io.TextIOWrapper(printed, encoding="ascii") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(arguments) == 0
        monkeypatch.undo()
        assert r"\ufffd" in printed.getvalue().decode("ascii")


@pytest.mark.long
def test_processes(thinker, home):
    """The same in processes of their own, with what only those have: arguments in bytes, and the interpreter's end."""

    def start(*arguments, **environment):
        command, pipe = [sys.executable, "-m", "quietstar", *arguments], subprocess.PIPE
        return subprocess.Popen(command, cwd=home, env={**os.environ, **environment}, stdout=pipe, stderr=pipe)

    closed = start(*THINK)
    closed.stdout.close()
    closed.stdout = None
    read = start("eval", "--model=thinker", "--data=gruesse.txt", "--length=16", "--held-out=2", **C_LOCALE)
    wrong = [
        start(b"think", b"--model=thinker", b"caf\xe9"),
        start("export", "--model=thinker", "--data=gruesse.txt", "--out=Grüße.jsonl", **C_LOCALE),
    ]
    codes, shown = [], []
    for process in (closed, read, *wrong):
        out, err = process.communicate(timeout=300)
        codes.append(process.returncode)
        shown.append((out or b"").decode("ascii") + err.decode("ascii"))
    assert codes == [errors.PIPE, 0, errors.USAGE, errors.USAGE], shown
    assert shown[0] == "" and "Traceback" not in "".join(shown)
    assert all(text.startswith("quietstar: ") and "is not UTF-8" in text and text.count("\n") == 1 for text in shown[2:])
