"""Wrong command lines and damaged files: a sentence and an exit code, never a traceback or a hang."""

import os
import resource
import signal
import sys
import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(__file__))
import hostile  # noqa: E402

from quietstar.cli.main import main  # noqa: E402

SECONDS = 20
CODES = (0, 2, 3, 4)
MEMORY = 6 * 2**30  # that a command may ask for


class Hang(BaseException):
    pass


MADE = []  # the template, made once


@pytest.fixture
def template(tiny, byte_tokenizer, tmp_path_factory):
    if MADE:
        return MADE[0]
    folder = tmp_path_factory.mktemp("template")

    def run(arguments):
        assert main(arguments) == 0, arguments

    before = os.getcwd()
    os.chdir(folder)
    try:
        model = tiny("llama", vocab_size=257, hidden_size=32, intermediate_size=48)
        hostile.make_template(folder, model, byte_tokenizer, run)
    finally:
        os.chdir(before)
    MADE.append(folder)
    return folder


@contextmanager
def limits():
    """In this context, a hang is an error, and so is a lot of memory."""

    def stop(*_):
        raise Hang(f"no end after {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before, limit = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limit[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limit)
        signal.signal(signal.SIGALRM, before)


def outcome(attack, capfd):
    """The exit code of an attack, and what broke the rule, or an empty text."""
    capfd.readouterr()
    code = None
    try:
        with limits():
            code = main(attack.arguments)
    except SystemExit as end:
        code = end.code
    except (Exception, Hang) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return (
            None,
            f"{type(error).__name__}: {str(error)[:150]} ({place.filename.rpartition('site-packages/')[2]}:{place.lineno})",
        )
    err = capfd.readouterr().err.replace("\r", "\n")
    if code not in CODES:
        return code, f"exit code {code}"
    if "Traceback" in err:
        return code, f"a traceback: {err[-300:]}"
    if code and not err.strip():
        return code, "nothing said"
    lines = [
        line for line in err.splitlines() if line.strip() and "it/s" not in line and "step/s" not in line and "s/it" not in line
    ]
    boxed = any(line.startswith("╭") for line in lines)
    if code and not boxed:
        sentence = [line for line in lines if line.startswith("quietstar: ")]
        if len(sentence) != 1:
            return code, f"{len(sentence)} sentences: {err[-300:]!r}"
    return code, ""


@pytest.mark.parametrize("command", hostile.GOOD)
def test_the_commands_work_before_they_are_attacked(command, template, tmp_path, monkeypatch, capfd):
    hostile.make_folder(template, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    code, wrong = outcome(hostile.Attack(hostile.line_of(command, hostile.GOOD[command])), capfd)
    assert code in ((0, 3) if command in ("vstar", "score") else (0,)) and not wrong, wrong


@pytest.mark.parametrize("kind, seed, count", [("lines", 0, 140), ("lines", 1, 140), ("files", 0, 140)])
def test_every_wrong_command_ends_in_a_sentence(kind, seed, count, template, tmp_path, monkeypatch, capfd, record_property):
    monkeypatch.chdir(template)
    attacks = hostile.wrong_lines(seed, count) if kind == "lines" else hostile.damaged_files(seed, count)
    codes, broken = Counter(), []
    for i, attack in enumerate(attacks):
        folder = tmp_path / str(i)
        hostile.make_folder(template, folder)
        monkeypatch.chdir(folder)
        if attack.damage is not None:
            (folder / attack.damage[0]).write_bytes(attack.damage[1])
        code, wrong = outcome(attack, capfd)
        codes[code] += 1
        if wrong:
            broken.append(f"{attack}\n    {wrong}")
    counts = ", ".join(f"{n} with code {code}" for code, n in sorted(codes.items(), key=str))
    record_property("table", f"{count} hostile {kind} of seed {seed}: {counts}; {len(broken)} broke the rule")
    assert not broken, f"{len(broken)} of {count} broke the rule:\n" + "\n".join(broken)
