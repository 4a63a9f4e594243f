"""SCoRe: a model learns to correct itself, by reinforcement over two attempts at each problem (arXiv 2409.12917).

The second attempt sees the first and a fixed request to look again, which does not say whether the first was right. Stage I
rewards the second attempt alone and holds the first to the base model, so that there stay mistakes to correct. Stage II rewards
both, and the second one more for what it makes better than the first: without that a model learns to answer once and repeat it.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.config import option
from quietstar.files import write_whole
from quietstar.recipes.common.log import tell
from quietstar.recipes.common.progress import Progress
from quietstar.recipes.common.rounds import save_model
from quietstar.recipes.common.sampling import evaluating, padded
from quietstar.recipes.score_attempts import Attempts, attempt, draw, votes
from quietstar.recipes.star import never
from quietstar.recipes.tasks import Row, Task
from quietstar.run.batches import mix_seed
from quietstar.run.resume import Settings
from quietstar.run.signals import Signals

FIRST, MODEL, REPORT, PLOT = "first-stage", "model", "score.json", "score.png"  # what a run writes


@dataclass
class Config:
    """SCoRe's numbers; bonus and both divergences' weights as in the code of BY571/SCoRe.

    Raises:
        ValueError: a value outside its range, by name.
    """

    out: str = option("runs/score", "folder of the run; one that is there goes on where it stopped", may_differ=True)
    first_steps: int = option(150, "updates of stage I; 0 leaves it out, a control")
    second_steps: int = option(150, "updates of stage II")
    problems: int = option(64, "problems of an update, drawn anew each time")
    samples: int = option(1, "attempts at each; with more than one they are compared among themselves, else over the batch")
    bonus: float = option(10.0, "alpha: the second attempt also earns this times its reward less the first's; 0 is a control")
    kl: float = option(0.01, "beta 1, weight of both attempts' divergence from the base model in stage II")
    first_kl: float = option(0.1, "beta 2, weight of the first attempt's divergence from the base model in stage I")
    credit: Literal["turn", "joint"] = option("turn", "turn: the first attempt earns its own reward; joint: the second's too")
    standardise: bool = option(False, "divide each attempt's advantages by their standard deviation over the batch")
    from_base: float = option(0.0, "share of training's first attempts that the base model writes, for more kinds of mistakes")
    temperature: float = option(1.0, "of the attempts in training, and of those that vote")
    max_new: int = option(64, "tokens of an attempt at most")
    learning_rate: float = option(1e-4, "of AdamW, constant")
    weight_decay: float = option(0.0, "of AdamW")
    clip: float = option(1.0, "largest gradient norm")
    held_out: int = option(400, "test problems for the accuracy of both attempts")
    chains: int = option(4, "pairs of attempts at each of them, which vote against as many tokens in parallel; 0 for none")
    batch_size: int = option(256, "attempts at once, in sampling and in training, for less memory")
    save_every: int = option(50, "updates between checkpoints", may_differ=True)
    seed: int = option(0, "fixes problems and attempts")

    def __post_init__(self) -> None:
        for name in ("first_steps", "second_steps", "bonus", "kl", "first_kl", "weight_decay", "chains"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("problems", "samples", "max_new", "held_out", "batch_size", "save_every"):
            self._check(name, getattr(self, name) >= 1, "1 or more")
        for name in ("temperature", "learning_rate", "clip"):
            self._check(name, getattr(self, name) > 0, "above 0")
        self._check("from_base", 0 <= self.from_base < 1, "from 0 to below 1")
        self._check("problems", self.problems * self.samples > 1, "2 or more where samples is 1, for there is one baseline")

    def _check(self, name: str, ok: bool, wanted: str) -> None:
        if not ok:
            raise ValueError(f"score: {name} must be {wanted}, got {getattr(self, name)!r}")

    def sampling(self, temperature: float) -> dict[str, Any]:
        """What ``rollout`` takes, but the seed."""
        return {"temperature": temperature, "max_new": self.max_new, "batch_size": self.batch_size}


def returns(rewards: Tensor, stage: int, config: Config) -> Tensor:
    """What attempts earn, [2,R], given which of them are right: nothing for the first in stage I, with a bonus in stage II.

    What the bonus takes off for a right first attempt is the same for every second one that answers to it. So with credit by
    turn it changes no expected gradient: that of the second attempt's own reward is 1 + bonus times as large, and no more.
    """
    first, second = rewards
    if stage == 1:
        first = torch.zeros_like(first)
    else:
        second = second + config.bonus * (second - first)
    return torch.stack([first + second if config.credit == "joint" else first, second])


def advantages(returns: Tensor, samples: int, standardise: bool = False) -> Tensor:
    """Returns [2,R] less the mean of the other samples of a problem, or of the other problems where there is one sample.

    With ``standardise`` those of each attempt have variance 1, unless all are 0, as the first's in stage I. A bonus then
    decides which second attempts are the better ones, and no longer how much more they count than the first.
    """
    groups = returns.unflatten(1, (-1, samples)) if samples > 1 else returns[:, None]
    n = groups.shape[2]
    found = ((groups - groups.mean(2, keepdim=True)) * n / (n - 1)).flatten(1)
    deviation = found.std(1, correction=0, keepdim=True)  # around a mean of 0
    return found / deviation.where(deviation > 1e-6, 1) if standardise else found


def read(
    model: PreTrainedModel, reference: PreTrainedModel, prompts: Sequence[list[int]], completions: Sequence[list[int]]
) -> tuple[Tensor, Tensor]:
    """Log-probability [R] of each completion, and at its tokens the summed divergence [R] of the model from the reference.

    The divergence is the whole vocabulary's at each token, sum over v of p(v) (log p(v) - log q(v)), with a gradient.
    """
    rows = [[*prompt, *ids] for prompt, ids in zip(prompts, completions, strict=True)]
    ids, mask = (x.to(model.device) for x in padded(rows))
    begin = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    written = mask[:, 1:] & (torch.arange(1, ids.shape[1], device=model.device) >= begin[:, None])
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    logprob = model(**inputs).logits[:, :-1][written].float().log_softmax(-1)
    with torch.no_grad():
        other = reference(**inputs).logits[:, :-1][written].float().log_softmax(-1)
    chosen = logprob.gather(1, ids[:, 1:][written][:, None])[:, 0]
    divergence = (logprob.exp() * (logprob - other)).sum(-1)
    row, nothing = written.nonzero()[:, 0], chosen.new_zeros(len(rows))
    return nothing.index_add(0, row, chosen), nothing.index_add(0, row, divergence)


def loss(
    model: PreTrainedModel, reference: PreTrainedModel, attempts: Attempts, advantage: Tensor, stage: int, config: Config
) -> tuple[Tensor, Tensor]:
    """The loss of each problem [R], and the divergence of both attempts [2,R], without a gradient.

    A first attempt that the base wrote is not reinforced: REINFORCE's gradient is an expectation over the model's own samples.
    It is what the second attempt answers to, and one more place where the model is held to the base.
    """
    advantage = (advantage * torch.stack([attempts.own, torch.ones_like(attempts.own)])).to(model.device)
    logprob, divergence = read(model, reference, attempts.prompts, attempts.first)
    logprob_second, divergence_second = read(model, reference, attempts.requests, attempts.second)
    policy = -advantage[0] * logprob - advantage[1] * logprob_second
    held = config.first_kl * divergence if stage == 1 else config.kl * (divergence + divergence_second)
    return policy + held, torch.stack([divergence, divergence_second]).detach()


def score(
    model: PreTrainedModel,
    task: Task,
    config: Config | None = None,
    name: str = "",
    resume: bool = False,
    base: PreTrainedModel | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Run both stages, or what a stopped run lacks; ``model`` is changed.

    Writes the model after stage I (first-stage) and at the end (model), metrics.jsonl, a line an update, and the report with
    its plots (score.json, score.png) into ``config.out``. SIGTERM and Ctrl-C finish the update and save.

    Args:
        model: writes an answer, and after a request a second one.
        name: of the model, which a run that goes on must have begun with.
        resume: go on with the run in ``config.out``, if there is one.
        base: what the divergence is from, where that isn't ``model`` as it is: for stage II alone, what stage I began with.

    Returns:
        The model and the report, ``examine`` of "base", "stage I", "stage II".

    Raises:
        ValueError: no right answer in the first batch, prompts that pass the model's positions, or a run in ``config.out`` that
            is another one or that ``resume`` doesn't ask for.
        Interrupted: after a signal, once all is saved.
    """
    config = config or Config()
    reference = copy.deepcopy(base or model).eval().requires_grad_(False)
    settings = Settings.of(config, recipe="score", model=name, task=task.name)
    progress = Progress(config.out, settings, {"step": 0, "report": {}}, resume)
    state, optimizer = progress.state, new_optimizer(model, config)
    if progress.begun:
        progress.load(model, optimizer)
    test = task.sample(config.held_out, "test", torch.Generator().manual_seed(config.seed))
    total = config.first_steps + config.second_steps
    ends = {"base": 0, "stage I": config.first_steps or None, "stage II": total}
    with Signals() as signals, evaluating(model):  # no dropout: attempts are scored by the policy that wrote them
        while True:
            for end, step in ends.items():
                if step == state["step"] and end not in state["report"]:
                    state["report"][end] = examine(model, reference, task, test, config)
                    tell(f"{config.out}, {end}", state["report"][end])
            if state["step"] == ends["stage I"]:
                optimizer = new_optimizer(model, config)
                save_model(Path(config.out) / FIRST, model, task, state["report"])
            if state["step"] == total:
                break
            progress.metrics.add(update(model, reference, optimizer, task, config, state["step"]))
            state["step"] += 1
            progress.save_if(signals, config.save_every, model, optimizer)
    save_model(Path(config.out) / MODEL, model, task, state["report"])
    progress.save(model, optimizer)
    write_whole(Path(config.out) / REPORT, json.dumps(state["report"], indent=2) + "\n")
    draw(Path(config.out) / PLOT, state["report"], progress.metrics.lines, f"SCoRe, {task.name}")
    return model, state["report"]


def examine(
    model: PreTrainedModel, reference: PreTrainedModel, task: Task, test: Sequence[Row], config: Config
) -> dict[str, Any]:
    """Greedy attempts at test problems: ``Attempts.figures``, changes, which is ``Attempts.histogram``, divergence_first and
    divergence_second, nats a token; and ``votes`` of attempts at ``config.temperature``.
    """
    greedy = attempt(model, task, test, config.sampling(0.0), config.seed)
    nats = torch.zeros(2)
    with torch.no_grad():
        for part in greedy.parts(config.batch_size):
            nats += loss(model, reference, part, torch.zeros_like(part.rewards), 2, config)[1].sum(1).cpu()
    first, second = (nats / greedy.tokens()).tolist()
    return {
        **greedy.figures(),
        "changes": greedy.histogram(),
        "divergence_first": first,
        "divergence_second": second,
        "votes": votes(model, task, test, config.chains, config.sampling(config.temperature), config.seed),
    }


def update(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    task: Task,
    config: Config,
    step: int,
) -> dict[str, Any]:
    """One update on new attempts at new problems; returns its figures."""
    began, seed = time.perf_counter(), mix_seed(config.seed, step)
    stage = 1 if step < config.first_steps else 2
    problems = task.sample(config.problems, "train", torch.Generator().manual_seed(seed))
    rows = [row for row in problems for _ in range(config.samples)]
    attempts = attempt(model, task, rows, config.sampling(config.temperature), seed, reference, config.from_base)
    if step == 0 and not attempts.rewards.any():
        raise ValueError(f"score: {never(task, rows, attempts.first)}")
    earned = returns(attempts.rewards, stage, config)
    advantage = advantages(earned, config.samples, config.standardise)
    optimizer.zero_grad()
    losses, divergences = [], []
    for part, several in zip(attempts.parts(config.batch_size), advantage.split(config.batch_size, 1), strict=True):
        value, divergence = loss(model, reference, part, several, stage, config)
        (value.sum() / len(rows)).backward()
        losses.append(value.detach())
        divergences.append(divergence)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    if not bool(norm.isfinite()):
        raise FloatingPointError(f"score: the gradient is {float(norm)} at update {step + 1}")
    optimizer.step()
    tokens, own = attempts.tokens(), attempts.own.nonzero()[:, 0].tolist()
    first, second = (torch.cat(divergences, 1).sum(1).cpu() / tokens).tolist()
    return {
        "step": step + 1,
        "stage": stage,
        "loss": float(torch.cat(losses).mean()),
        "return_first": float(earned[0].mean()),
        "return_second": float(earned[1].mean()),
        "divergence_first": first,  # nats a token
        "divergence_second": second,
        **{name: x for name, x in attempts.part(own).figures().items() if name not in ("problems", "low", "high")},
        "grad_norm": float(norm),
        "tokens": int(tokens.sum()),
        "seconds": time.perf_counter() - began,
    }


def new_optimizer(model: PreTrainedModel, config: Config) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
