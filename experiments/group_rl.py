"""Group RL raises the share of chains that are right, from 0.33 to 0.63, but STaR learns more from as many chains of its own
(0.79). More and smaller updates, at a higher rate, are more than half of that gap, 0.09 of 0.16; the rest, 0.07 ± 0.03, is
STaR's with GRPO's rate and updates. Written chains teach nearly all. After GRPO one greedy chain is right more often (0.73)
than a vote of 16 chains of the base (0.46), and after STaR more often still (0.84). The question: does GRPO, whose completions
share their prompt's computation, teach a model to reason, and how does it compare with STaR and supervision at equal tokens?

A model that solves about half of 2 x 2-digit multiplications with a chain learns by TRL's GRPO with `SharedPrompts`: 200
updates of 32 problems, 8 completions each; the reward is 1 for a right answer. The controls start from the same model and have
as many completions, 51,200, to sample and to learn from, 80 in an update. STaR samples chains in four rounds and trains on the
right ones, going on from the latest model; in the full size also from the base in each round. "STaR, GRPO's rate and updates"
takes as few and as large updates as GRPO, at its rate. SFT trains on chains that are written by rule, which no other run sees.
Shuffled rewards go to another completion of the same problem; they destroy the model, so that the base is the harder control.

Rates were tried on seed 0; GRPO has 3e-4, and what happens at others is in the log. Accuracy is that of single samples at
temperature 1, "vote" and "any" are of 16 samples, on all 815 held-out problems.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from experiments_claims import Claim, figure
from small_base import base
from transformers import PreTrainedModel

from quietstar.files.reading import read_json
from quietstar.run.batches import mix_seed
from quietstar_recipes.common.evaluation import evaluate
from quietstar_recipes.common.plots import Panel, panels
from quietstar_recipes.common.sampling import rollout
from quietstar_recipes.common.saving import REPORT, load_model, save_model
from quietstar_recipes.common.selectors import majority
from quietstar_recipes.common.solutions import to_samples
from quietstar_recipes.common.training import SFTConfig, sft
from quietstar_recipes.star import Config, star
from quietstar_recipes.tasks import Row, Task

TITLE = "Group RL"
BASE, GRPO, SHUFFLED, REPEATED = "base", "GRPO", "GRPO, shuffled rewards", "GRPO, repeated prompts"
STAR, RESTARTED, SFT = "STaR, no restart", "STaR", "SFT on written chains"
FEWER = "STaR, GRPO's rate and updates"
CLAIMS = (
    Claim(
        "Group RL learns from rewards, and more than STaR from as many chains of its own.", GRPO, (BASE, SHUFFLED, STAR, FEWER)
    ),
)
# Updates of GRPO, problems in each and completions of each; rounds of STaR; test problems.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"updates": 2, "problems": 32, "group": 4, "rounds": 2, "test": 10},
    "quick": {"updates": 200, "problems": 32, "group": 8, "rounds": 4, "test": 815},
    "full": {"updates": 200, "problems": 32, "group": 8, "rounds": 4, "test": 815},
}
RATE = 3e-4  # of GRPO
SUPERVISED: dict[str, Any] = {"learning_rate": 1e-3, "batch_tokens": 1600}
IN_BATCH = 80  # completions in these 1,600 tokens
SAMPLES, MAX_NEW, BATCH = 16, 20, 1024  # solutions of a test problem; tokens in each; how many are written at once


def run(seed: int, size: str, out: Path) -> dict[str, Any]:
    numbers = SIZES[size]
    model, task = base(seed, size)
    if size == "tiny":  # a base of five updates solves nothing
        task.check = lambda row, ids: sum(ids) % 3 == 0  # type: ignore[method-assign]
    test = task.sample(numbers["test"], "test", torch.Generator().manual_seed(mix_seed(seed, 5)))
    asked = task.sample(numbers["updates"] * numbers["problems"], "train", torch.Generator().manual_seed(mix_seed(seed, 6)))
    completions = len(asked) * numbers["group"]
    steps = max(1, completions // IN_BATCH)  # of the supervised runs
    result: dict[str, Any] = {"rows": [], "right": {}}

    def report(name: str, trained: PreTrainedModel, **more: float) -> None:
        result["rows"].append({"run": name, **figures(trained, task, test, seed), **more})

    def reinforced(name: str, **options: bool) -> None:
        folder = place(out, name)
        if not folder.exists():
            began = time.process_time()
            trained, right = group_rl(model, task, asked, folder.with_suffix(".trl"), seed, numbers, **options)
            save_model(folder, trained, task, {"right": right, "seconds": time.process_time() - began})
        saved = read_json(folder / REPORT, dict[str, Any])
        result["right"][name] = saved["right"]
        report(name, load_model(folder, model), seconds=saved["seconds"])

    def own_chains(name: str, restart: bool = False, updates: int = steps, **options: Any) -> None:
        rounds = numbers["rounds"]
        shares = {"rounds": rounds, "problems": completions // rounds, "steps": max(1, updates // rounds), "growth": 1.0}
        drawing = {"temperature": 1.0, "max_new": MAX_NEW, "batch_size": BATCH}
        measured = {"test_problems": numbers["test"], "valid_problems": 50}
        learning = SUPERVISED | options
        config = Config(out=str(place(out, name)), restart=restart, seed=seed, **shares, **drawing, **measured, **learning)
        report(name, star(copy.deepcopy(model), task, config, resume=True)[0])

    report(BASE, model)
    reinforced(GRPO)
    reinforced(SHUFFLED, shuffled=True)
    own_chains(STAR)
    in_update = numbers["problems"] * numbers["group"]
    tokens = in_update * SUPERVISED["batch_tokens"] // IN_BATCH
    own_chains(FEWER, updates=numbers["updates"], learning_rate=RATE, batch_tokens=tokens)
    written = [(row.prompt_ids, task.completion_ids(row)) for row in asked]
    report(SFT, sft(copy.deepcopy(model), written, steps, SFTConfig(**SUPERVISED), seed))
    if size != "quick":
        own_chains(RESTARTED, restart=True)
        reinforced(REPEATED, shared=False)
    return result


def place(out: Path, name: str) -> Path:
    """The folder of a run."""
    return out / name.replace(", ", "-").replace(" ", "-")


def group_rl(
    model: PreTrainedModel,
    task: Task,
    rows: Sequence[Row],
    out: Path,
    seed: int,
    numbers: dict[str, int],
    shared: bool = True,
    shuffled: bool = False,
) -> tuple[PreTrainedModel, list[float]]:
    """A copy of the model after GRPO on these problems, each once, and the share of right completions in each update.

    Args:
        shared: with ``SharedPrompts``; without, TRL repeats a prompt for each of its completions.
        shuffled: completions of a problem get each other's rewards.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from quietstar import SharedPrompts

    class SharedGRPOTrainer(SharedPrompts, GRPOTrainer):
        pass

    right_of: list[float] = []

    def reward(completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float]:
        right = torch.tensor([float(task.check(rows[i], ids)) for i, ids in zip(number, completion_ids, strict=True)])
        right_of.append(float(right.mean()))
        if shuffled:
            groups = right.view(-1, numbers["group"])
            generator = torch.Generator().manual_seed(mix_seed(seed, len(right_of)))
            right = groups.gather(1, torch.rand(groups.shape, generator=generator).argsort(1)).flatten()
        return right.tolist()

    arguments = GRPOConfig(
        str(out),
        max_steps=numbers["updates"],
        per_device_train_batch_size=numbers["problems"] * numbers["group"],
        num_generations=numbers["group"],
        max_completion_length=MAX_NEW,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        seed=seed,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
    )
    data = Dataset.from_list([{"prompt": row.problem.prompt, "number": i} for i, row in enumerate(rows)])
    trainer = (SharedGRPOTrainer if shared else GRPOTrainer)(
        copy.deepcopy(model), reward, arguments, train_dataset=data, processing_class=copy.deepcopy(task.tokenizer)
    )
    trainer.train()
    return trainer.model, right_of


def figures(model: PreTrainedModel, task: Task, test: Sequence[Row], seed: int) -> dict[str, float]:
    """How many problems are solved by one sample, a greedy answer, the vote of samples, and any of them."""
    drawing = {"max_new": MAX_NEW, "seed": mix_seed(seed, 7), "batch_size": BATCH}
    samples = to_samples(task, test, rollout(model, task, [row.prompt_ids for row in test], SAMPLES, **drawing))
    return {
        "accuracy": fmean(x.right for several in samples for x in several),
        "greedy": evaluate(model, task, test, MAX_NEW, batch_size=BATCH)["accuracy"],
        "vote": fmean(majority(several).right for several in samples),
        "any": fmean(any(x.right for x in several) for several in samples),
    }


def plot(results: list[dict[str, Any]], path: Path) -> str:
    updates = len(results[0]["right"][GRPO])
    width = max(1, updates // 20)
    starts = range(0, updates - width + 1, width)
    curves = {
        name: [[(i + width / 2, fmean(result["right"][name][i : i + width])) for i in starts] for result in results]
        for name in results[0]["right"]
    }
    runs = [row["run"] for row in results[0]["rows"]]
    bars = [
        Panel(label, "", bars={run: [figure(result, run, name) for result in results] for run in runs})
        for name, label in (("accuracy", "accuracy of single samples"), ("any", "any of 16 samples"))
    ]
    panels(path, TITLE, [Panel("update", "right completions", curves, share=True), *bars])
    return "Share of right completions in training; accuracy of single samples, and of any of 16. Thin lines and dots are seeds"
