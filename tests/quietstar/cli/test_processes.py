"""Commands as processes: a reader that goes away, a disk that is full, locales and arguments that are not UTF-8."""

import os
import subprocess
import sys

import pytest

from quietstar import QuietStar, ThoughtConfig
from quietstar.cli import errors

C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
THINK = ["think", "--model=thinker", "Hi there"]


@pytest.fixture
def start(home, tiny, byte_tokenizer):
    """``start(arguments, **environment)``: a process of quietstar in a folder with a model that thinks."""
    model = tiny("llama", vocab_size=257, hidden_size=32, intermediate_size=48)
    QuietStar(model, ThoughtConfig(thoughts=1, thought_tokens=2, lookahead=2), byte_tokenizer).save_pretrained("thinker")
    (home / "gruesse.txt").write_text("Grüße, 你好, 🙂.\n\n" * 40, encoding="utf-8")

    def start(arguments, stdout=subprocess.PIPE, **environment):
        command = [sys.executable, "-m", "quietstar", *arguments]
        pipes = {"stdout": stdout, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=home, env={**os.environ, **environment}, **pipes)

    return start


def lines(process):
    """Exit code, output, and the lines on stderr that are not a progress bar."""
    out, err = process.communicate(timeout=120)
    shown = [line for line in err.decode().replace("\r", "\n").splitlines() if line and "step/s" not in line]
    return process.returncode, (out or b"").decode(), shown


def test_a_reader_that_goes_away_ends_a_command_silently(start):
    """As in ``quietstar think ... | head``: while it prints, and when what it printed is written as it ends."""
    many, few = start(["think", "--model=thinker", "Hi there " * 300]), start(THINK)
    for process in (many, few):
        process.stdout.close()
        process.stdout = None
    assert [lines(process) for process in (many, few)] == 2 * [(errors.PIPE, "", [])]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.slow
def test_output_to_a_full_disk(start):
    with open("/dev/full", "wb") as full:
        code, _, err = lines(start(THINK, stdout=full))
    assert code == errors.RUNTIME and len(err) == 1 and "No space left on device" in err[0]


def test_the_c_locale(start):
    """ASCII alone on the terminal, and files are UTF-8 all the same."""
    generate = start(["generate", "--model=thinker", "--prompt=Hi", "--max-new-tokens=20", "--show-thoughts"], **C_LOCALE)
    data = ["--model=thinker", "--data=gruesse.txt", "--length=16", "--held-out=2"]
    ask = start(["eval", *data, "--out=eval.json"], **C_LOCALE)
    for process in (generate, ask):
        code, out, err = lines(process)
        assert code == 0 and out and out.isascii() and not any("Error" in line for line in err), err


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["C", "UTF-8"])
def test_arguments_that_are_not_utf_8(start, locale):
    environment = C_LOCALE if locale == "C" else {"LC_ALL": "C.UTF-8"}
    wrong = [
        [b"think", b"--model=thinker", b"caf\xe9"],
        [b"generate", b"--model=thinker", b"--prompt=caf\xe9"],
        [b"eval", b"--model=thinker", b"--data=caf\xe9.txt"],
        [b"export", b"--model=thinker", b"--data=gruesse.txt", b"--out=caf\xe9.jsonl"],
        [b"train", b"--model=thinker", b"--data=gruesse.txt", b"--out=caf\xe9"],
    ]
    for arguments in wrong:
        code, out, err = lines(start(arguments, **environment))
        assert code == errors.USAGE and len(err) == 1 and "is not UTF-8" in err[0] and not out, (arguments, err)
