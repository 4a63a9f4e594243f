"""Does thinking help on natural text? Quiet-STaR on mathematical web pages, against its controls, as one command.

    python experiments/natural_text.py --cost    the memory and the GPU hours that it needs, worked out before anything runs
    python experiments/natural_text.py           the experiment; the same line continues one that was stopped
    python experiments/natural_text.py --tiny    all of it on a CPU in a minute, with a random model, to see that it runs

A language model is trained on the same texts in several ways, its arms: without thoughts (plain), and with Quiet-STaR. Each is
measured on held-out texts, with its own thoughts, another text's, one constant thought and random tokens, and on the questions
of GSM8K and CommonsenseQA, by the published probability of the right answer and by exact match. Every phase leaves a JSON file
in the folder and is skipped when that is there; training resumes from its last checkpoint. docs/results.md says what which
result would mean.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import natural_text_evaluation as evaluation
import natural_text_report
import torch
import tyro
from natural_text_cost import Machine, cost
from natural_text_settings import Experiment
from natural_text_tiny import TINY, with_files
from transformers.utils import logging
from tyro.conf import OmitArgPrefixes, arg

from quietstar.checkpoints.pretrained import load_tokenizer
from quietstar.cli.main import main as quietstar
from quietstar.data.sources import hub_rows
from quietstar.data.texts import DataConfig, load_data
from quietstar.data.texts import read_texts as texts_of
from quietstar.evaluation.questions.reading import read_questions
from quietstar.files.reading import json_lines, read_json
from quietstar.files.writing import write_whole
from quietstar.run.resume import Settings

SPLITS = {"gsm8k": "test", "commonsense_qa": "validation"}  # CommonsenseQA's test split has no answers


@dataclass(frozen=True)
class Phase:
    """A part of the experiment that is done once ``result`` is there."""

    result: Path
    work: Callable[[], dict[str, Any]]


def phases(e: Experiment) -> Iterator[Phase]:
    """All phases in their order; each may need what those before it wrote."""
    yield Phase(e.folder / "data.json", partial(freeze_data, e))
    yield from measurements(e, evaluation.BASE, thinks=False)
    for seed in range(e.seeds):
        for arm in e.arms:
            name = f"{arm}-{seed}"
            yield Phase(e.folder / name / "training.json", partial(train, e, arm, seed))
            yield from measurements(e, name, thinks=arm != "plain")


def measurements(e: Experiment, name: str, thinks: bool) -> Iterator[Phase]:
    """What is measured of one model."""
    yield Phase(e.folder / name / "losses.json", partial(measure_losses, e, name, thinks))
    for task, split in SPLITS.items():
        asked = len(read_questions(str(e.folder / f"{task}.jsonl"), split))
        for start in range(0, asked, e.block):
            yield Phase(e.folder / name / f"{task}-{start:05d}.json", partial(answer, e, name, thinks, task, start))


def freeze_data(e: Experiment) -> dict[str, Any]:
    """Texts and questions in files of the folder, so that a data set that changes on the hub changes nothing here."""
    texts = texts_of(DataConfig(e.data, hub_texts=e.texts))
    write_rows(e.texts_file, [{"text": text} for text in texts])
    asked = {}
    for task, split in SPLITS.items():
        source = getattr(e, task)
        of_file = source.endswith(".jsonl")
        rows = [row for _, row in json_lines(Path(source))] if of_file else hub_rows(source, split, e.questions)
        write_rows(e.folder / f"{task}.jsonl", rows[: e.questions])
        asked[task] = len(rows[: e.questions])
    config = DataConfig(str(e.texts_file), length=e.length, held_out=e.held_out)
    data = load_data(config, load_tokenizer(e.model), e.lookahead)
    held_out = [example["input_ids"].tolist() for example in data.held_out]
    write_whole(e.folder / "held_out.json", json.dumps(held_out) + "\n")
    return {"texts": len(texts), "sha256": data.sha256, "examples": len(data.train), "held_out": len(held_out), **asked}


def train(e: Experiment, arm: str, seed: int) -> dict[str, Any]:
    """``quietstar train``, which resumes from its last checkpoint, in this process or in one for each GPU."""
    evaluation.model.cache_clear()
    gc.collect()  # of the training before, what refers to itself in a circle
    out = e.folder / f"{arm}-{seed}"
    options = out / "options.json"
    out.mkdir(parents=True, exist_ok=True)
    write_whole(options, json.dumps(e.training(arm, seed, out), indent=1) + "\n")
    arguments = ["train", "--config", str(options), "--resume"]
    if e.gpus == 1:
        code = quietstar(arguments)
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={e.gpus}", "-m", "quietstar"]
        code = subprocess.run([*launcher, *arguments]).returncode
    if code:
        raise SystemExit(code)
    lines = [line for _, line in json_lines(out / "metrics.jsonl")]
    return {"steps": len(lines), "training_seconds": sum(line["seconds"] for line in lines), "last": lines[-1]}


def measure_losses(e: Experiment, name: str, thinks: bool) -> dict[str, Any]:
    texts = [{"input_ids": torch.tensor(ids)} for ids in read_json(e.folder / "held_out.json", list[list[int]])]
    return evaluation.held_out_losses(evaluation.model(e, name), texts, thinks, e.eval_batch)


def answer(e: Experiment, name: str, thinks: bool, task: str, start: int) -> dict[str, Any]:
    """One block of questions."""
    questions = read_questions(str(e.folder / f"{task}.jsonl"))[start : start + e.block]
    tokens = getattr(e, f"{task}_tokens")
    return {"questions": evaluation.answers(evaluation.model(e, name), questions, thinks, tokens, e.eval_batch)}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def check_settings(e: Experiment) -> None:
    """Save the settings, or refuse to go on with others. Raises ValueError."""
    settings, path = Settings.of(e), e.folder / "settings.json"
    if path.exists():
        settings.check(e.folder, read_json(path, dict[str, Any]))
    e.folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(settings.values, indent=1) + "\n")


@dataclass(frozen=True)
class Command:
    """Train Quiet-STaR and its controls on natural text, and measure what thinking gains."""

    experiment: OmitArgPrefixes[Experiment]
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)
    tiny: Annotated[bool, arg(help="a random model and a few texts instead of these defaults, on a CPU")] = False
    cost: Annotated[bool, arg(help="print what the experiment would cost, and run nothing")] = False


def main(arguments: list[str]) -> int:
    logging.disable_progress_bar()
    tiny = "--tiny" in arguments  # known before the rest is read, since the defaults depend on it
    command = tyro.cli(Command, args=arguments, default=Command(TINY if tiny else Experiment(), tiny=tiny))
    e = with_files(command.experiment) if tiny else command.experiment
    if command.cost:
        print(cost(e, command.machine))
        return 0
    check_settings(e)
    for phase in phases(e):
        if not phase.result.exists():
            print(f"{phase.result}: begun", flush=True)
            began = time.perf_counter()
            found = phase.work()
            seconds = time.perf_counter() - began
            phase.result.parent.mkdir(exist_ok=True)
            write_whole(phase.result, json.dumps({"seconds": seconds, **found}) + "\n")
            print(f"{phase.result}: done, {seconds:.0f} s", flush=True)
    print(natural_text_report.write(e))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"natural_text.py: {error}")
