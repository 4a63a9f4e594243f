"""Runs that are killed: what SIGKILL leaves resumes to what an unbroken run writes."""

import json
import random
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.quietstar.run import killing

TIMES = re.compile(r"seconds|\w+_per_second|speeds|(report|state)\.json")  # and what manifests say of files with times
TEXTS = "--data=../text.txt --no-pack --length=12"
THOUGHTS = f"--model=../model {TEXTS} --thoughts=2 --policy-weight=3 --embedding-scale=1 --learning-rate=1e-3 --batch-size=4"
TRAIN = f"train --out=run {THOUGHTS} --thought-tokens=2 --lookahead=2"
PROBLEMS = "--out=run --model=../solver --task=addition --digits=1"
OFTEN = "--save-every=2 --eval-every=2"
COMMANDS = {
    "train": f"{TRAIN} --held-out=4 --steps=16 {OFTEN}",
    "star": f"star {PROBLEMS} --max-new=8 --rounds=4 --problems=20 --steps=4 --test-problems=8 --rationalize",
    "vstar": f"vstar {PROBLEMS} --max-new=8 --rounds=3 --problems=20 --steps=3 --samples=4 --test-problems=8 --test-samples=4"
    " --pair-batch=8 --updates=4",
    "score": f"score {PROBLEMS} --max-new=8 --first-steps=5 --second-steps=5 --save-every=2 --problems=8 --held-out=4"
    " --chains=1",
    "internalize": f"internalize {PROBLEMS} --explicit-steps=0 --steps-per-token=2 --final-steps=6"
    f" --rows=20 --held-out=8 --batch-size=4 {OFTEN}",
    "fast": f"fast --out=run {THOUGHTS} --held-out=4 --curriculum=3-2,2-1 --steps=4 --plain-steps=6 --plain-rate=1e-3 {OFTEN}",
    "export": f"export --out=run/thoughts.jsonl --model=../thinker {TEXTS} --batch-size=2",
}
KILLS = {"train": 8, "star": 4, "vstar": 3, "score": 3, "internalize": 4, "fast": 4, "export": 3}
# Signals are answered in one place by commands that take training steps and those that don't.
CASES = [(name, False) for name in COMMANDS] + [(name, True) for name in ("train", "export")]


@pytest.fixture
def home(model_folder):
    """A folder with a model and a text."""
    return model_folder.parent


@pytest.fixture(scope="module")
def commands():
    """Runs commands, and kills them."""
    running = killing.Commands()
    yield running
    running.close()


class UsersFiles:
    """What a user puts into a run's folders: notes, and copies of what is there under names of their own."""

    NAMES = ("README.md", "notes.txt", "step-notes.txt", "round-notes.txt", "mine.safetensors", ".notes/mine.txt")

    def __init__(self, out):
        self.out, self.content = out, {}

    def add(self):
        """Notes in every folder of the run, apart from links and checkpoints that the run deletes; a copy of every folder."""
        for folder in [self.out, *self.out.rglob("*")]:
            name = folder.relative_to(self.out)
            if not folder.is_dir() or folder.is_symlink() or re.search(r"(^|/)\.|-best", str(name)):
                continue
            copied = folder.with_name(f"{folder.name}-best")
            if folder != self.out and not copied.exists():
                shutil.copytree(folder, copied)
                self.content |= {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
            if not re.search(r"step-\d+", str(name)):
                for path in (folder / name for name in self.NAMES):
                    if not path.exists():
                        path.parent.mkdir(exist_ok=True)
                        path.write_text(f"mine: {path}")
                        self.content[path] = path.read_bytes()

    def check(self, in_place):
        """Nothing of it is lost; in the middle of a save it may be in the folder that is being replaced."""
        there = {path: path.read_bytes() for path in self.out.rglob("*") if path.is_file()}
        kept = there.items() if in_place else [(path, x) for path in self.content for x in there.values()]
        assert [str(path) for path, _ in self.content.items() - kept] == []

    def remove(self):
        """So that what is left is the run's."""
        for path in self.content:
            path.unlink()
            for folder in path.parents:
                if any(folder.iterdir()):
                    break
                folder.rmdir()


def without_times(value):
    if isinstance(value, dict):
        return {name: without_times(x) for name, x in value.items() if not TIMES.fullmatch(name)}
    return [without_times(x) for x in value] if isinstance(value, list) else value


def content(out):
    """What a run wrote, by path: weights and moments as bytes, JSON without times, of plots that they are there."""
    readers = {
        ".json": lambda path: without_times(json.loads(path.read_text())),
        ".jsonl": lambda path: [without_times(json.loads(line)) for line in path.read_text().splitlines()],
        ".png": lambda path: path.stat().st_size > 0,
    }
    files = [path for path in out.rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): readers.get(path.suffix, Path.read_bytes)(path) for path in files}


ASKS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@pytest.mark.long
@pytest.mark.parametrize("name, asked", CASES)
def test_what_a_signal_leaves_resumes_to_what_an_unbroken_run_writes(home, solver, commands, name, asked, record_property):
    """Stopped again and again, and resumed each time: by SIGKILL at random moments and right before random changes inside its
    saves, or asked to stop, at random moments, which ends with exit code 75."""
    arguments, generator = COMMANDS[name].split(), random.Random(name)
    model, task = solver
    model.save_pretrained(home / "solver")
    task.tokenizer.save_pretrained(home / "solver")
    if name == "export":
        assert commands.run([*TRAIN.split(), "--held-out=0", "--steps=1"], home / "model").code == 0
        (home / "thinker").symlink_to(home / "model/run")
    else:
        arguments.append("--resume")

    def start(folder, **kill):
        (folder / "run").mkdir(parents=True, exist_ok=True)
        return commands.run(arguments, folder, **kill)

    unbroken = start(home / "unbroken")
    assert unbroken.code == 0, (home / "unbroken/output.txt").read_text()
    want, killed, inside, runs = content(home / "unbroken/run"), 0, 0, 0
    codes = (0, 75) if asked else (0, -signal.SIGKILL)
    while killed < KILLS[name]:
        runs += 1
        folder, left, ended = home / f"broken-{runs}", len(unbroken.changes), None
        users = UsersFiles(folder / "run")
        while ended is None or ended.code:
            kill = {}
            if killed < KILLS[name]:  # soon enough that others can follow
                soon = generator.uniform(0, max(left / 3, 3))
                at_random = asked or killed % 3 == 0
                kill = {"seconds": 0.05 + unbroken.seconds * soon / left} if at_random else {"change": 1 + int(soon)}
                kill |= {"number": ASKS[killed % 4]} if asked else {}
            ended = start(folder, **kill)
            assert ended.code in codes, (folder / "output.txt").read_text()
            left = max(1, left - len(ended.changes))
            users.check(in_place=ended.code == 0)
            if ended.code:
                killed += 1
                inside += killing.begun_a_save(folder)
                users.add()
        users.remove()
        found = content(folder / "run")
        differ = [name for name in want.keys() | found.keys() if want.get(name) != found.get(name)]
        if asked:  # the checkpoint before the last may be one that was asked for
            last = max((name.split("/")[1] for name in want if name.startswith("checkpoints/")), default="")
            differ = [name for name in differ if not name.startswith("checkpoints/") or f"/{last}/" in name]
        assert differ == []  # names, since pytest would take hours to show how weights differ
    assert asked or inside > killed / 3
    record_property(
        "table",
        f"{'asked' if asked else 'SIGKILL'}, {name}: {killed} kills, {inside} inside a save, {runs} runs resumed to the end",
    )
