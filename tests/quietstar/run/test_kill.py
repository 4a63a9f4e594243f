"""Runs that are killed: a signal saves within a step, and what SIGKILL leaves resumes to the numbers of an unbroken run."""

import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar.cli import main as cli
from quietstar.run import snapshots

KILLS = 20
TIMES = {"seconds", "tokens_per_second", "thoughts_per_second"}
SMALL = ["--no-pack", "--length=12", "--batch-size=4", "--thoughts=2", "--thought-tokens=2", "--lookahead=2", "--held-out=0"]
SMALL += ["--learning-rate=1e-3", "--policy-weight=3", "--embedding-scale=1"]


@pytest.fixture
def home(tiny, tmp_path, monkeypatch):
    """A folder with a model and a text; one thread, so that a busy machine only slows the tests down."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny("llama", vocab_size=257, hidden_size=32, intermediate_size=48).save_pretrained("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(["<end>", *alphabet])}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>").save_pretrained("model")
    (tmp_path / "text.txt").write_text("\n".join(f"{i} lines of text" for i in range(50)))
    return tmp_path


def arguments(out, **options):
    typed = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return ["train", "--model=model", "--data=text.txt", *SMALL, f"--out={out}", *typed]


def metrics(out):
    """Whole lines of the metrics so far, without times."""
    try:
        lines = (out / "metrics.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [{name: x for name, x in json.loads(line).items() if name not in TIMES} for line in lines]


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_within_a_step(home, number):
    out = home / "run"
    command = [sys.executable, "-m", "quietstar", *arguments("run", steps=100_000, save_every=100_000)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: len(metrics(out)) >= 2 or process.poll() is not None)
        before = len(metrics(out))
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == cli.SAVED, err
    (saved,) = snapshots.every(out)
    snapshots.check(saved)
    step = int(saved.name.removeprefix("step-"))
    # The step under way ends; another may have ended between counting and the signal.
    assert before <= step <= before + 2 and len(metrics(out)) == step
    last_line = err.replace("\r", "\n").splitlines()[-1]
    assert f"saved run/checkpoints/{saved.name}" in last_line and "Traceback" not in err


@pytest.mark.slow
def test_killed_at_random_moments_the_losses_are_the_unbroken_runs(home):
    """SIGKILL 20 times, from the first moment of a process to the middle of its steps and saves, resumed each time."""
    context = multiprocessing.get_context("forkserver")  # a process starts in a tenth of a second, its imports done
    context.set_forkserver_preload(["__main__", "quietstar.cli.main"])

    def start(out):
        process = context.Process(target=cli.main, args=([*arguments(out, steps=90, save_every=2), "--resume"],))
        process.start()
        return process

    unbroken = start("unbroken")
    wait_for(lambda: metrics(home / "unbroken"))
    began = time.monotonic()
    unbroken.join(240)
    stepping = time.monotonic() - began
    assert unbroken.exitcode == 0
    want = metrics(home / "unbroken")
    assert [line["step"] for line in want] == list(range(1, 91))
    began = time.monotonic()
    start("unbroken").join(240)  # it has nothing left to do
    starting = time.monotonic() - began

    out, generator, killed = home / "broken", random.Random(0), []
    for _ in range(KILLS):
        process = start("broken")
        time.sleep(generator.uniform(0, starting + stepping / 10))
        alive = process.is_alive()
        process.kill()
        process.join()
        done = snapshots.every(out)
        for path in done:
            snapshots.check(path)
        killed.append((alive, done[-1].name if done else None))
    assert sum(alive for alive, _ in killed) >= KILLS / 2, killed  # a machine that was busy before may be faster now
    last = start("broken")
    last.join(240)
    assert last.exitcode == 0
    assert metrics(out) == want, killed
    assert [path.name for path in out.joinpath("checkpoints").iterdir() if path.name.startswith(".")] == []
    first, second = (home / name / "checkpoints" / "step-000090" for name in ("unbroken", "broken"))
    for name in ("model.safetensors", "quietstar.safetensors", "optimizer.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
