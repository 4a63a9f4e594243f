"""A verifier of solutions, trained by DPO on pairs of a right and a wrong one; the reference model is the one it begins as."""

from __future__ import annotations

import copy
import itertools
import random
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from quietstar.checkpoints.places import checkpoint_of
from quietstar.checkpoints.pretrained import load_tokenizer
from quietstar.config import option
from quietstar.files.reading import read_json
from quietstar_kernels.checks import check_positive
from quietstar_recipes.common.logprobs import likelihoods
from quietstar_recipes.common.saving import REPORT, load_model
from quietstar_recipes.tasks import Task


class Solution(TypedDict):
    """A solution, right or wrong; ``split`` is its problem's."""

    prompt: list[int]
    ids: list[int]
    right: bool
    split: str


Pair = tuple[list[int], list[int], list[int]]  # ids of a prompt, a right and a wrong solution


@dataclass
class DPO:
    """How the verifier is trained."""

    pairs: int = option(16, "most pairs of a right and a wrong solution per problem")
    beta: float = option(0.1, "beta of DPO: how strongly the verifier is held to the reference model")
    verifier_rate: float = option(3e-4, "learning rate of the verifier; 1e-5 for a large model")
    pair_batch: int = option(32, "pairs per update")
    updates: int = option(1000, "most updates of the verifier; it never takes more than one pass over the pairs")

    def __post_init__(self) -> None:
        check_positive("vstar", self, ("pairs", "beta", "verifier_rate", "pair_batch", "updates"))


def make_pairs(solutions: Sequence[Solution], split: str, most: int, seed: int) -> list[Pair]:
    """Different pairs of a right and a wrong solution of one problem of the split, in random order.

    A solution is chosen as often as it was drawn. Those with a right answer after a wrong chain are rare, but differ from each
    other: if each counted once, they would be most of the right ones where many samples of short solutions are drawn.

    Args:
        most: pairs per problem at most.
    """
    by_prompt: defaultdict[tuple[int, ...], tuple[list, list]] = defaultdict(lambda: ([], []))
    for x in solutions:
        if x["split"] == split:
            by_prompt[tuple(x["prompt"])][not x["right"]].append(tuple(x["ids"]))
    choose = random.Random(seed)
    pairs: list[Pair] = []
    for prompt, (right, wrong) in by_prompt.items():
        candidates = list(itertools.product(sorted(right), sorted(wrong)))
        chosen = dict.fromkeys(choose.sample(candidates, min(most, len(candidates))))
        pairs += [(list(prompt), list(x), list(y)) for x, y in chosen]
    choose.shuffle(pairs)
    return pairs


def train_verifier(
    reference: PreTrainedModel, task: Task, pairs: Sequence[Pair], config: DPO, seed: int
) -> tuple[PreTrainedModel, list[float]]:
    """A copy of the reference model after at most one pass of TRL's DPO over the pairs, and the losses."""
    try:
        from datasets import Dataset, disable_progress_bars
        from transformers import PrinterCallback  # importing it imports peft too
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise ValueError("vstar: the verifier needs TRL: pip install trl") from error
    disable_progress_bars()
    # At most one pass: a verifier that has memorised its pairs ranks others badly.
    steps = min(config.updates, max(1, len(pairs) // config.pair_batch))
    with tempfile.TemporaryDirectory() as folder:
        options = DPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=config.pair_batch,
            learning_rate=config.verifier_rate,
            warmup_steps=min(20, steps // 2),
            lr_scheduler_type="constant_with_warmup",
            beta=config.beta,
            max_length=None,
            seed=seed,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=reference.device.type == "cpu",
        )
        # TRL changes the models that it is given, so it gets copies.
        trainer = DPOTrainer(
            copy.deepcopy(reference),
            copy.deepcopy(reference),
            options,
            train_dataset=Dataset.from_list([as_trl_example(task, pair) for pair in pairs[: steps * config.pair_batch]]),
            processing_class=task.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    verifier = copy.deepcopy(reference)
    verifier.load_state_dict(cast(PreTrainedModel, trainer.model).state_dict())
    return verifier.eval(), [line["loss"] for line in trainer.state.log_history if "loss" in line]


def as_trl_example(task: Task, pair: Pair) -> dict[str, str]:
    """The pair as text, as TRL expects it; it tokenizes the prompt followed by each solution."""
    prompt, *both = (task.tokenizer.decode(ids) for ids in (pair[0], pair[0] + pair[1], pair[0] + pair[2]))
    chosen, rejected = (text[len(prompt) :] for text in both)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def measure_pairs(
    verifier: PreTrainedModel, reference: PreTrainedModel, pairs: Sequence[Pair], beta: float, batch_size: int
) -> dict[str, float | None]:
    """On pairs from held-out problems: the DPO loss, and the share of pairs whose right solution the verifier scores higher."""
    if not pairs:
        return {"held_out_loss": None, "held_out_order": None}
    prompts, right, wrong = map(list, zip(*pairs, strict=True))
    scores = [
        torch.tensor([likelihoods(judge, prompts, ids, batch_size) for ids in (right, wrong)])
        for judge in (verifier, reference)
    ]
    margin = (scores[0] - scores[1]).diff(dim=0).neg()[0]
    order = (scores[0][0] > scores[0][1]).float().mean()
    return {"held_out_loss": float(-logsigmoid(beta * margin).mean()), "held_out_order": float(order)}


def load_verifier(path: str, generator: str, model: PreTrainedModel, task: Task) -> PreTrainedModel:
    """The verifier of a V-STaR run, for solutions of ``model``, which was loaded from ``generator``."""
    verifier, named = load_model(Path(path), model), generator or "the model"
    shapes = [{name: x.shape for name, x in one.named_parameters()} for one in (verifier, model)]
    other = f"{path}: the verifier is of another base model"
    if load_tokenizer(path).get_vocab() != task.tokenizer.get_vocab():
        raise ValueError(f"{other}: its tokens differ from those of {named}")
    if shapes[0] != shapes[1]:
        raise ValueError(f"{other}: its weights have other shapes than {named}")
    folders = [Path(path), *([Path(checkpoint_of(generator))] if generator else [])]
    bases = [read_json(file, dict[str, Any]).get("base") for x in folders if (file := x / REPORT).is_file()]
    if len(bases) == 2 and None not in bases and bases[0] != bases[1]:
        raise ValueError(f"{other}, {bases[0]}; {generator} started with {bases[1]}")
    return verifier
