"""Wrong command lines from a seed: hostile values of every option, files and folders of the wrong kind, damaged JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import typing
from pathlib import Path
from typing import Any

from quietstar.cli.main import COMMANDS

DATA = {"data": "text.txt", "length": "16", "held_out": "4"}
TASK = {"task": "addition", "digits": "1", "batch_size": "4"}
# Each command with options with which it is done quickly, and without an error.
GOOD: dict[str, dict[str, str]] = {
    "train": {**DATA, "model": "model", "out": "new", "steps": "1", "batch_size": "2", "thought_tokens": "2", "lookahead": "2"},
    "think": {"model": "thinker", "": "Hi", "at": "-1"},
    "generate": {"model": "thinker", "prompt": "Hi", "max_new_tokens": "2"},
    "explain": {"model": "thinker", "": "Hi there", "out": "new.html"},
    "eval": {**DATA, "model": "thinker", "batch_size": "4", "out": "new.json"},
    "ask": {"model": "thinker", "questions": "questions.jsonl", "max_new_tokens": "2", "out": "new.json"},
    "export": {**DATA, "data": "few.txt", "model": "thinker", "out": "new.jsonl"},
    "merge": {"model": "thinker", "out": "new"},
    "doctor": {"model": "model"},
    "star": {**TASK, "sft_steps": "1", "no_filter": "", "rounds": "1", "problems": "4", "steps": "1", "test_problems": "2"}
    | {"valid_problems": "2", "max_new": "4", "out": "new", "model": "solver"},
    "vstar": {**TASK, "rounds": "1", "problems": "4", "samples": "2", "steps": "1", "test_problems": "2", "test_samples": "2"}
    | {"valid_problems": "2", "max_new": "4", "out": "new", "model": "solver"},
    "solve": {**TASK, "problems": "2", "samples": "2", "attempts": "0", "max_new": "4", "out": "new", "model": "solver"},
    "internalize": {**TASK, "explicit_steps": "0", "steps_per_token": "1", "final_steps": "1", "rows": "20", "held_out": "2"}
    | {"out": "new"},
    "score": {**TASK, "first_steps": "1", "second_steps": "0", "problems": "2", "held_out": "2", "max_new": "4"}
    | {"out": "new", "model": "solver"},
    "fast": {**DATA, "model": "model", "out": "new", "curriculum": "2-1", "steps": "1", "plain_steps": "1", "batch_size": "2"},
}
FILES = {"data", "thoughts_from", "config", "questions", "file"}
FOLDERS = {"model", "verifier"}
OUT = {"out", "resume"}
# Large values of these are refused or cost memory; of the others, such as --steps, they only take long.
COSTLY = {"batch_size", "length", "thoughts", "thought_tokens", "lookahead", "anchor_chunk", "lora_rank", "processes", "digits"}
COSTLY |= {"accumulation", "warmup", "held_out", "batch_tokens", "components", "seed", "held_out_seed", "limit"}

INTS = 3 * ["0", "-1", "-5", str(2**63), str(10**30), str(-(10**30))]
INTS += ["nan", "1.5", "1e3", "", "\u0663", "0x10", "None", "9" * 5000]
LARGE = [str(x) for x in (10**6, 2**31, 10**12, 2**62, 2**63 - 1)]
FLOATS = ["nan", "inf", "-inf", "1e308", "1e400", "1e-320", "-1", "-0.0", str(10**30), "9" * 400, "", "one", "1_0", "0"]
WORDS = ["", "\0", "\udcff", ".", "-"]
TEXTS = [*WORDS, "x\0y", "caf\udce9", "a" * 10**5, "\n", "\u202e", "\U0001f600", "--", "*", "null", "~", "../.."]
PATHS = [*WORDS, "caf\udce9.txt", "a" * 5000, "a/" * 3000, "nowhere", "no/where.txt", "folder", "pipe", "loop", "loop/x"]
PATHS += ["dangling"]
PATHS += ["text.txt/x", "pipe.jsonl", "..", "~", "x:y", "a/b/c", "http://[", "/dev/zero", "/dev/null", "/proc/self/mem"]
WRITTEN = [*WORDS, "a" * 5000, "no/where/x", "no/where/x.jsonl", "folder", "pipe", "loop", "loop.jsonl", "loop/x", "text.txt"]
WRITTEN += ["text.txt/x", "pipe.jsonl", "folder.jsonl", "/proc/x.json", "/proc/self/x", "x", "x.md", "x.png", "x.parquet", "/"]

DEEP = 100_000
HOSTILE_JSON = {
    "nothing": "",
    "blank": " \n\n",
    "null": "null",
    "number": "3",
    "text": '"x"',
    "list": "[]",
    "object": "{}",
    "nan": "NaN",
    "huge": "1e999",
    "digits": "1" * 5000,
    "deep lists": "[" * DEEP + "]" * DEEP,
    "deep objects": '{"a":' * DEEP + "1" + "}" * DEEP,
    "deep under a known name": '{"model": ' + "[" * DEEP + "]" * DEEP + "}",
    "cut": '{"model": "mod',
    "surrogate": '{"model": "\\ud800", "text": "\\udfff", "question": "\\ud800"}',
    "surrogate as a name": '{"\\ud800": 1}',
    "zero byte": '{"model": "\\u0000"}',
    "wrong types": '{"model": 3, "text": [], "question": {"stem": 1}, "answer": {}, "thought_ids": 1, "steps": "x"}',
    "two documents": "{} {}",
    "no json": "model: [model",
}
HOSTILE_BYTES = {
    "latin": b'{"model": "caf\xe9"}',
    "utf16": '{"model": "m"}'.encode("utf-16"),
    "zeros": bytes(4096),
    "mark": b"\xef\xbb\xbf",
}
BOMB = "\n".join(["a0: &a0 [x, x]"] + [f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]" for i in range(60)])
HOSTILE_YAML = {
    "aliases": BOMB,
    "tag": "!!python/object/apply:os.system [ls]",
    "merge": "a: &a {b: 1}\nc: {<<: *a}",
    "tabs": "a:\t- b\n\t- c",
}
VALUES = [None, True, -1, 0, 2**63, 10**30, 1e308, float("nan"), "", "x", "\ud800", "a" * 10**5]
VALUES += [[], {}, [None], {"x": 1}, [[[]]], "/dev/zero"]


@dataclasses.dataclass(frozen=True)
class Attack:
    """A command line, and a file to damage before it runs.

    Attributes:
        damage: name and content of a file, or None.
    """

    arguments: tuple[str, ...]
    damage: tuple[str, bytes] | None = None

    def __str__(self) -> str:
        shown = " ".join(repr(x if len(x) < 60 else f"{x[:50]}... {len(x)}")[1:-1] for x in self.arguments)
        return shown + (f"  [{self.damage[0]}: {self.damage[1][:60]!r}]" if self.damage else "")


def options_of(command: str) -> dict[str, str]:
    """Each option of a command with the kind of its values."""
    found = {}

    def walk(config: type) -> None:
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            kind = hints[field.name]
            if dataclasses.is_dataclass(kind):
                walk(typing.cast(type, kind))
            elif field.name in FILES | FOLDERS | OUT:
                found[field.name] = field.name
            else:
                found[field.name] = next((x for x in ("bool", "Literal", "int", "float") if x in str(kind)), "text")

    walk(COMMANDS[command])
    return found


def line_of(command: str, options: dict[str, str]) -> tuple[str, ...]:
    typed = [
        f"--{name.replace('_', '-')}" + (f"={value}" if value or not name.startswith("no_") else "")
        for name, value in options.items()
        if name
    ]
    return (command, *([options[""]] if "" in options else []), *typed)


def hostile_value(choose: random.Random, name: str, kind: str) -> str:
    if name in FILES | FOLDERS:
        return choose.choice(PATHS + [f"hostile/{x}" for x in os.listdir("hostile")])
    if name in OUT:
        return choose.choice(WRITTEN)
    if kind == "int":
        return choose.choice(INTS + LARGE * 6 if name in COSTLY else INTS)
    if kind == "float":
        return choose.choice(FLOATS)
    if kind == "bool":
        return choose.choice(["maybe", "2", ""])
    return choose.choice(TEXTS + INTS[:5])


def wrong_lines(seed: int, count: int, commands: typing.Sequence[str]) -> list[Attack]:
    """Command lines in which one option or several are hostile; must run in a folder of ``make_folder``."""
    choose = random.Random(seed)
    attacks = []
    for i in range(count):
        command = commands[i % len(commands)]
        kinds, options = options_of(command), dict(GOOD[command])
        for name in choose.sample(sorted(kinds), min(choose.choice([1, 1, 1, 1, 2, 3]), len(kinds))):
            options[name] = hostile_value(choose, name, kinds[name])
        line = list(line_of(command, options))
        match choose.randrange(12):
            case 0:
                line.insert(choose.randrange(1, len(line) + 1), choose.choice(TEXTS))
            case 1:
                line.insert(
                    choose.randrange(1, len(line) + 1),
                    choose.choice(["--", "--stpes=1", "--resume", "--config", "--model", "--no-model"]),
                )
            case 2:
                line.remove(choose.choice([word for word in line if not word.startswith("--data")]))
        attacks.append(Attack(tuple(line)))
    return attacks


# Files that the commands read, and a command that reads them; checkpoints/test_damage.py has all of checkpoints.
READ: dict[str, tuple[str, ...]] = {
    "model/config.json": line_of("train", GOOD["train"]),
    "model/tokenizer.json": line_of("train", GOOD["train"]),
    "text.jsonl": line_of("train", GOOD["train"] | {"data": "text.jsonl"}),
    "thoughts.jsonl": line_of("train", GOOD["train"] | {"data": "few.txt", "thoughts_from": "thoughts.jsonl", "thoughts": "1"}),
    "questions.jsonl": line_of("ask", GOOD["ask"]),
    "problems.jsonl": line_of("solve", GOOD["solve"] | {"task": "gsm8k", "data": "problems.jsonl", "model": "model"}),
    "choices.jsonl": line_of("solve", GOOD["solve"] | {"task": "csqa", "data": "choices.jsonl", "model": "model"}),
    "options.json": ("train", "--config=options.json", "--out=new"),
    "run/config.json": ("train", "--config=run/config.json", "--resume"),
    "run/metrics.jsonl": ("train", "--config=run/config.json", "--resume"),
    "thinker/quietstar.json": line_of("think", GOOD["think"]),
    "star/recipe.json": line_of("star", GOOD["star"] | {"out": "star", "resume": "auto"}),
    "star/round-00/report.json": line_of("star", GOOD["star"] | {"out": "star", "resume": "auto", "rounds": "2"}),
    "star/metrics.jsonl": line_of("star", GOOD["star"] | {"out": "star", "resume": "auto", "rounds": "2"}),
    "icot/progress/state.json": line_of("internalize", GOOD["internalize"] | {"out": "icot", "resume": "auto"}),
    "icot/metrics.jsonl": line_of("internalize", GOOD["internalize"] | {"out": "icot", "resume": "auto"}),
    "fast/recipe.json": line_of("fast", GOOD["fast"] | {"out": "fast", "resume": "auto"}),
    "fast/stage-1-2-1/chosen.json": line_of("fast", GOOD["fast"] | {"out": "fast", "resume": "auto"}),
}


def damaged_files(seed: int, count: int, files: typing.Sequence[str]) -> list[Attack]:
    """Command lines that are right, and a file that they read damaged; must run in a folder of ``make_folder``."""
    choose = random.Random(seed)
    whole = {**HOSTILE_JSON, **HOSTILE_YAML}
    contents = [x.encode() for x in whole.values()] + list(HOSTILE_BYTES.values())
    attacks = []
    for i in range(count):
        name = files[i % len(files)]
        file = Path(name)
        mutable = file.suffix in (".json", ".jsonl") and choose.random() < 0.6
        content = mutated(choose, file.read_text(encoding="utf-8")) if mutable else choose.choice(contents)
        attacks.append(Attack(READ[name], (name, content)))
    return attacks


def mutated(choose: random.Random, text: str) -> bytes:
    """JSON, or its lines, with one value replaced, dropped or nested deeply."""
    lines = text.splitlines() if not text.startswith("{\n") else [text]
    at = choose.randrange(len(lines))
    value = json.loads(lines[at])
    place, key = choose.choice(list(_places(value)))
    if choose.random() < 0.2 and isinstance(place, dict):
        del place[key]
    else:
        place[key] = choose.choice(VALUES)
    lines[at] = json.dumps(value)
    return "\n".join(lines).encode()


def _places(value: Any) -> typing.Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []:
        yield value, key
        yield from _places(value[key])


def make_template(folder: Path, model: Any, tokenizer: Any) -> None:
    """Models and data that the attacks use or damage, in ``folder``, the current one."""
    import torch

    from quietstar import QuietStar, ThoughtConfig
    from quietstar_recipes.common.models import small_model
    from quietstar_recipes.tasks import Addition

    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    torch.manual_seed(0)
    config = ThoughtConfig(thoughts=1, thought_tokens=2, lookahead=2)
    QuietStar(model, config, tokenizer, verify=False).save_pretrained("thinker")
    task = Addition(1)
    small_model(task, width=32, heads=2, positions=128).save_pretrained("solver")
    task.tokenizer.save_pretrained("solver")
    texts = [f"Paragraph {i} has a few words." for i in range(40)]
    choices = [{"label": x, "text": x} for x in "AB"]
    rows = {
        "text.jsonl": [{"text": x} for x in texts],
        "questions.jsonl": 3 * [{"question": "How many?", "answer": "two #### 2"}],
        "problems.jsonl": [{"question": f"How many {i}?", "answer": "it is two #### 2"} for i in range(40)],
        "choices.jsonl": [{"question": {"stem": f"{i}?", "choices": choices}, "answerKey": "A"} for i in range(40)],
    }
    for name, values in rows.items():
        (folder / name).write_text("".join(json.dumps(x) + "\n" for x in values), encoding="utf-8")
    options = {name: value for name, value in GOOD["train"].items() if name != "out"}
    whole = {"text.txt": "\n\n".join(texts), "few.txt": "\n\n".join(texts[:6]), "options.json": json.dumps(options, indent=2)}
    for name, content in whole.items():
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "folder" / "within").mkdir(parents=True)
    (folder / "folder.jsonl").mkdir()
    _write_hostile_files(folder / "hostile")


def make_runs(run: typing.Callable[[list[str]], None]) -> None:
    """Runs and exports in a folder of ``make_template``; ``run`` runs a command, which must succeed."""
    made = {"export": "thoughts.jsonl", "train": "run", "star": "star", "internalize": "icot", "fast": "fast"}
    for command, out in made.items():
        run(list(line_of(command, GOOD[command] | {"out": out})))


def _write_hostile_files(folder: Path) -> None:
    folder.mkdir()
    for name, text in HOSTILE_JSON.items():
        for suffix in ("json", "jsonl"):
            (folder / f"{name}.{suffix}").write_text(text, encoding="utf-8")
    for name, text in HOSTILE_YAML.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    for name, content in HOSTILE_BYTES.items():
        for suffix in ("json", "jsonl", "txt", "parquet", "yaml"):
            (folder / f"{name}.{suffix}").write_bytes(content)


def make_folder(template: Path, folder: Path) -> None:
    """A copy of the template with links and pipes."""
    shutil.copytree(template, folder, ignore=shutil.ignore_patterns("hostile"))
    (folder / "hostile").symlink_to(template / "hostile")
    for name in ("loop", "loop.jsonl"):
        (folder / name).symlink_to(name)
    (folder / "dangling").symlink_to("nowhere")
    for name in ("pipe", "pipe.jsonl"):
        os.mkfifo(folder / name)
