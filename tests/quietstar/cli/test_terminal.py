"""What a run shows on a terminal: a bar that fits, evaluations, what Ctrl-C does, and the summary with its picture."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import sys
import termios
import threading
from contextlib import contextmanager

import pytest

from quietstar import training
from quietstar.checkpoints import places
from quietstar.cli import errors, summary


@contextmanager
def terminal(monkeypatch, columns):
    """A pseudo-terminal as stdout and stderr; gives a list whose only entry, at the end, is all that was written to it."""
    controller, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    written, result = [], []

    def read():
        try:
            while part := os.read(controller, 4096):
                written.append(part)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    before = os.dup(2)
    os.dup2(end, 2)  # signals are answered past sys.stderr
    try:
        with open(end, "w", encoding="utf-8") as screen, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            patch.setattr(sys, "stderr", screen)
            yield result
    finally:
        os.dup2(before, 2)
        os.close(before)
    reader.join()
    os.close(controller)
    result.append(b"".join(written).decode())


@pytest.mark.parametrize("columns, figures", [(80, "loss_ce reward weight th/s"), (40, "loss_ce")])
def test_the_bar_fits_the_terminal(train, monkeypatch, columns, figures):
    """Without the parts of a gain, which would be longer lines."""
    with terminal(monkeypatch, columns) as screen:
        train("--out=run", "--data=text.txt", "--no-pack", "--no-controls", "--steps=2")
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", screen[0])]
    bars = [line for line in lines if " ETA " in line]
    assert bars and max(map(len, bars)) <= columns
    assert bars[0].startswith("0/2 ") and re.match(r"2/2 █+ ETA 00:00 loss_ce \d\.\d{3}", bars[-1])
    assert any("held-out loss" in line for line in lines) and "mixing " not in screen[0]
    assert re.findall(r"loss_ce|reward|weight|th/s", bars[-1]) == figures.split()
    assert all(len(line) <= 80 for line in lines if "/model.safetensors" not in line)


def test_without_a_terminal_a_run_prints_lines(train, monkeypatch):
    monkeypatch.setattr("quietstar.run.metrics.SECONDS", 0)
    with open("err", "w") as err, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", err)
        train("--out=run")
    with open("err", newline="") as err:
        shown = err.read()
    assert [line[:11] for line in shown.splitlines() if " of " in line] == [f"step {n} of 4" for n in range(1, 5)]
    assert "\r" not in shown and max(map(len, shown.splitlines())) <= 80


def test_evaluations_are_lines_above_the_bar(home, train, monkeypatch):
    with terminal(monkeypatch, 80) as screen:
        train("--out=run", "--no-pack")
    lines = read(home / "run" / "metrics.jsonl")
    for n, x, prefix in [(0, lines[0], "eval_0_"), (2, lines[1], "eval_"), (4, lines[3], "eval_")]:
        base, mixed = (f"{x[prefix + name]:.3f}" for name in ("base", "mixed"))
        gain, mixing, content = (
            f"{name} {x[prefix + name]:+.3f} ({x[f'{prefix}{name}_low']:+.3f} to {x[f'{prefix}{name}_high']:+.3f})"
            for name in ("gain", "mixing", "content")
        )
        want = [f"step {n}: held-out loss {base}, thinking {mixed}, {gain}", f"  = {mixing} + {content}"]
        assert "\r" + "".join(f"{line}\r\n" for line in want) in screen[0] and max(map(len, want)) <= 80
    assert "0/4" in screen[0] and " evaluating 0/1" in screen[0]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def pressed(train, monkeypatch):
    """``pressed(*signals)``: the exit code of a run that gets them in its second step, what it shows, and what it saved."""

    def run(*signals):
        calls, original = [], training.prepare_parts
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have started the tests

        def interrupted(*arguments, **options):
            calls.append(1)
            for number in signals if len(calls) == 2 else ():
                signal.raise_signal(number)
            return original(*arguments, **options)

        with monkeypatch.context() as patch, terminal(monkeypatch, 80) as screen:
            patch.setattr(training, "prepare_parts", interrupted)
            code, _, _ = train("--out=run", "--save-every=4")
        return code, " ".join(screen[0].split()), [path.name for path in places.every("run")]

    return run


STOPS = "stopping after this step, and saving"
ASKS = "press Ctrl-C again to quit now and lose the steps since the last save"


@pytest.mark.parametrize(
    "signals, says",
    [
        ([signal.SIGHUP, signal.SIGUSR1], [f"SIGHUP: {STOPS}", f"SIGUSR1: {STOPS}"]),
        ([signal.SIGTERM, signal.SIGINT, signal.SIGINT], [f"SIGTERM: {STOPS}", f"Ctrl-C: {STOPS}", ASKS]),
    ],
)
def test_a_signal_is_answered_at_once_and_a_second_one_loses_nothing(pressed, signals, says):
    code, said, saved = pressed(*signals)
    assert code == errors.SAVED and saved == ["step-000002"]
    how = "continue with: quietstar train --config run/config.json --resume"
    places = [said.index(text) for text in [*says, "stopped by a signal; saved run/checkpoints/step-000002; " + how]]
    assert places == sorted(places)
    assert said.count(STOPS) + said.count(ASKS) == len(says)


def test_a_third_ctrl_c_ends_the_run_at_once(pressed):
    code, said, saved = pressed(*[signal.SIGINT] * 3)
    assert code == errors.STOPPED and saved == [] and ASKS in said and "nothing was saved since" in said


def test_what_to_type_next_follows_from_what_is_held_out(quietstar, train, home):
    """Though nothing was evaluated."""
    _, out, _ = train("--out=run", "--steps=1", "--eval-every=0")
    assert "\n  quietstar eval --model run\n" in out and "none was evaluated" in out and "--held-out keeps texts" not in out
    for command in ("eval", "explain"):
        assert quietstar(command, "--model=run")[0] == 0
    out = summary.finish("run", read(home / "run" / "metrics.jsonl"), held_out=False)
    assert "\n  quietstar eval --model run --data OTHER.txt --all\n" in out and "--held-out keeps texts" in out


@pytest.mark.long
def test_the_summary(home, train):
    pytest.importorskip("matplotlib")
    code, out, err = train("--out=run", "--no-pack")
    assert code == 0 and not err
    first, *_, last = read(home / "run" / "metrics.jsonl")
    rows = {line[:20].strip(): line[20:].split() for line in out.splitlines() if line.startswith("  ")}
    assert rows["language model"] == [f"{first['eval_0_base']:.4f}", f"{last['eval_base']:.4f}"]
    assert rows["gain from thoughts"] == [f"{first['eval_0_gain']:+.4f}", f"{last['eval_gain']:+.4f}"]
    for sign, part in {"=": "mixing", "+": "content"}.items():
        assert rows[f"{sign} {part}"] == [f"{first[f'eval_0_{part}']:+.4f}", f"{last[f'eval_{part}']:+.4f}"]
        assert f"{part:<8} {last[f'eval_{part}_low']:+.4f} to {last[f'eval_{part}_high']:+.4f}" in out
    assert rows["reward"] == [f"{first['reward']:.4f}", f"{last['reward']:.4f}"]
    assert {"weight", "loss_ce", "thoughts/s"} <= set(rows) and "training, 4 steps in " in out
    assert f"{last['eval_gain_low']:+.4f} to {last['eval_gain_high']:+.4f}" in out
    assert "\n  run/checkpoints/step-000004\n  run/metrics.jsonl\n  run/metrics.png\nnext\n" in out
    assert "\n  quietstar eval --model run\n" in out and '\n  quietstar generate --model run "Some text"' in out
    assert "\ntoo few texts to say " in out and "\nworth, the smaller of gain and content: " in out
    assert (home / "run" / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_figures_that_mean_nothing_are_left_out():
    line = {"step": 1, "loss_ce": 0.0, "reward": 0.1, "weight": 1.0, "thoughts_per_second": 5.0, "seconds": 1.0}
    text = summary._training_text([line])
    assert "training, 1 step in" in text and text.count("step 1") == 1
    assert "loss_ce" not in text and "weight" not in text and "reward" in text
    assert "weight" in summary._training_text([line, line | {"weight": 0.5}])
