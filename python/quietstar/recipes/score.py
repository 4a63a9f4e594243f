"""SCoRe: a model learns to correct itself, by reinforcement learning over two attempts at each problem (arXiv 2409.12917).

The second attempt sees the first and a fixed request to look again, which does not say whether the first was right. Stage I
rewards only the second attempt and keeps the first close to the base model, so that there are still mistakes to correct. Stage
II rewards both, and the second one more for what it improves on the first; without that bonus a model learns to answer once and
repeat it.
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

from quietstar.arguments.fields import check, check_at_least, check_positive, check_types
from quietstar.config import option
from quietstar.files.writing import write_whole
from quietstar.recipes.common.evaluation import nothing_solved
from quietstar.recipes.common.log import LOG, Pace, log_figures
from quietstar.recipes.common.logprobs import evaluating, padded
from quietstar.recipes.common.optimization import adamw, clipped_step
from quietstar.recipes.common.progress import Progress, State
from quietstar.recipes.common.rounds import load_model, save_model
from quietstar.recipes.score_attempts import Attempts, Figures, attempt, plot, votes
from quietstar.recipes.score_two_turns import learn_two_turns
from quietstar.recipes.tasks import Row, Task
from quietstar.run.batches import mix_seed
from quietstar.run.lock import alone_in_out
from quietstar.run.resume import Settings
from quietstar.run.signals import Signals

__all__ = ["Config", "score"]

START, FIRST, MODEL, REPORT, PLOT = "two-turns", "first-stage", "model", "score.json", "score.png"  # files of a run
NO_SECOND_ATTEMPT = (
    "score: no second attempt is right, so there is nothing to reward: two_turn_steps=200 first teaches the model to make one"
)


@dataclass
class Config:
    """The options of SCoRe; the bonus and the weights of both divergences are those of the code of BY571/SCoRe.

    Raises:
        ValueError: a value outside its range, by name.
    """

    out: str = option("runs/score", "folder of the run", may_differ=True)
    two_turn_steps: int = option(
        0, "supervised updates before stage I, for a model that has never made a second attempt; 0 if it does"
    )
    two_turn_problems: int = option(2000, "training problems with chains for these updates")
    two_turn_rate: float = option(5e-4, "peak learning rate of these updates")
    first_steps: int = option(150, "updates of stage I; 0 leaves it out, a control")
    second_steps: int = option(150, "updates of stage II")
    problems: int = option(64, "problems per update, drawn anew each time")
    samples: int = option(1, "attempts at each problem; several are compared with each other, one with the rest of the batch")
    bonus: float = option(10.0, "alpha: the second attempt also earns this times its reward minus the first's; 0 is a control")
    kl: float = option(0.01, "beta 1, weight of the divergence of both attempts from the base model in stage II")
    first_kl: float = option(0.1, "beta 2, weight of the divergence of the first attempt from the base model in stage I")
    credit: Literal["turn", "joint"] = option("turn", "turn: the first attempt earns its own reward; joint: also the second's")
    standardise: bool = option(False, "divide the advantages of each attempt by their standard deviation over the batch")
    from_base: float = option(0.0, "share of training's first attempts that the base model writes, for more kinds of mistakes")
    temperature: float = option(1.0, "sampling temperature of the attempts in training, and of those that vote")
    max_new: int = option(64, "most tokens in an attempt")
    learning_rate: float = option(1e-4, "learning rate of AdamW, constant")
    weight_decay: float = option(0.0, "weight decay of AdamW")
    clip: float = option(1.0, "largest gradient norm")
    held_out: int = option(400, "test problems for the accuracy of both attempts")
    chains: int = option(4, "pairs of attempts at each of them that vote, against as many parallel tokens; 0 for none")
    batch_size: int = option(256, "attempts at once, in sampling and in training; fewer take less memory")
    save_every: int = option(50, "updates between checkpoints", may_differ=True)
    seed: int = option(0, "fixes problems and attempts")

    def __post_init__(self) -> None:
        check_types("score", self)
        none_allowed = ("two_turn_steps", "first_steps", "second_steps", "bonus", "kl", "first_kl", "weight_decay", "chains")
        check_at_least("score", self, 0, none_allowed)
        at_least_one = ("two_turn_problems", "problems", "samples", "max_new", "held_out", "batch_size", "save_every")
        check_at_least("score", self, 1, at_least_one)
        check_positive("score", self, ("two_turn_rate", "temperature", "learning_rate", "clip"))
        check("score", self, "from_base", 0 <= self.from_base < 1, "from 0 to below 1")
        enough = self.problems * self.samples > 1
        check("score", self, "problems", enough, "2 or more where samples is 1, since attempts are compared with each other")

    def sampling(self, temperature: float) -> dict[str, Any]:
        """The arguments of ``rollout``, except the seed."""
        return {"temperature": temperature, "max_new": self.max_new, "batch_size": self.batch_size}


def returns(rewards: Tensor, stage: int, config: Config) -> Tensor:
    """What the attempts earn, [2,R], given which of them are right.

    In stage I the first attempt earns nothing; in stage II the second one earns the bonus. What the bonus subtracts for a right
    first attempt is the same for every second attempt that follows it. With credit by turn it therefore changes no expected
    gradient: the gradient of the second attempt's own reward is 1 + bonus times as large, and that is all.
    """
    first, second = rewards
    if stage == 1:
        first = torch.zeros_like(first)
    else:
        second = second + config.bonus * (second - first)
    return torch.stack([first + second if config.credit == "joint" else first, second])


def advantages(returns: Tensor, samples: int, standardise: bool = False) -> Tensor:
    """Returns [2,R] minus the mean of the other samples of the problem, or of the other problems if there is one sample each.

    With ``standardise`` the advantages of each attempt have variance 1, unless all are 0, as the first attempt's are in stage
    I. A bonus then only decides which second attempts are better, and no longer how much more they count than the first ones.
    """
    groups = returns.unflatten(1, (-1, samples)) if samples > 1 else returns[:, None]
    n = groups.shape[2]
    found = ((groups - groups.mean(2, keepdim=True)) * n / (n - 1)).flatten(1)
    deviation = found.std(1, correction=0, keepdim=True)  # their mean is 0
    return found / deviation.where(deviation > 1e-6, 1) if standardise else found


def logprob_and_divergence(
    model: PreTrainedModel, base: PreTrainedModel, prompts: Sequence[list[int]], completions: Sequence[list[int]]
) -> tuple[Tensor, Tensor]:
    """Log-probability [R] of each completion, and the divergence [R] of the model from the base, summed over its tokens.

    The divergence is that of the whole distribution at each token, sum over v of p(v) (log p(v) - log q(v)), with a gradient.
    """
    rows = [[*prompt, *ids] for prompt, ids in zip(prompts, completions, strict=True)]
    ids, mask = (x.to(model.device) for x in padded(rows))
    begin = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    written = mask[:, 1:] & (torch.arange(1, ids.shape[1], device=model.device) >= begin[:, None])
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    logprob = model(**inputs).logits[:, :-1][written].float().log_softmax(-1)
    with torch.no_grad():
        other = base(**inputs).logits[:, :-1][written].float().log_softmax(-1)
    chosen = logprob.gather(1, ids[:, 1:][written][:, None])[:, 0]
    divergence = (logprob.exp() * (logprob - other)).sum(-1)
    row, nothing = written.nonzero()[:, 0], chosen.new_zeros(len(rows))
    return nothing.index_add(0, row, chosen), nothing.index_add(0, row, divergence)


def loss(
    model: PreTrainedModel, base: PreTrainedModel, attempts: Attempts, advantage: Tensor, stage: int, config: Config
) -> tuple[Tensor, Tensor]:
    """The loss of each problem [R], and the divergence of both attempts [2,R], which has no gradient.

    First attempts that the base model wrote are not reinforced, since REINFORCE's gradient is an expectation over the model's
    own samples. They are what the second attempt responds to, and one more place where the model is kept close to the base.
    """
    advantage = (advantage * torch.stack([attempts.own, torch.ones_like(attempts.own)])).to(model.device)
    logprob, divergence = logprob_and_divergence(model, base, attempts.prompts, attempts.first)
    logprob_second, divergence_second = logprob_and_divergence(model, base, attempts.requests, attempts.second)
    reinforce = -advantage[0] * logprob - advantage[1] * logprob_second
    held = config.first_kl * divergence if stage == 1 else config.kl * (divergence + divergence_second)
    return reinforce + held, torch.stack([divergence, divergence_second]).detach()


class RunState(State):
    """Where a run is, and the figures of the base model and of each finished stage."""

    report: dict[str, Figures]


@alone_in_out(Config)
def score(
    model: PreTrainedModel,
    task: Task,
    config: Config | None = None,
    name: str = "",
    resume: bool = False,
    base: PreTrainedModel | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Run the warm-up, if there is one, and both stages, or what a stopped run lacks; ``model`` is changed.

    Writes the model after the warm-up (two-turns), after stage I (first-stage) and at the end (model), metrics.jsonl with a
    line per update of the stages, and the report with its plots (score.json, score.png) into ``config.out``. SIGTERM and Ctrl-C
    finish the current update and save, but for those of the warm-up, which a continued run repeats.

    Args:
        model: writes an answer, and a second one when asked to.
        name: the model's name; a resumed run must have started with the same one.
        resume: continue the run in ``config.out``, if there is one.
        base: the model that the divergence is measured from; default ``model`` as it is passed, or after the warm-up. For stage
            II alone, what stage I started with.

    Returns:
        The model and the report, which holds what ``evaluate`` returns under "base", "stage I" and "stage II".

    Raises:
        ValueError: no chains for the warm-up, no right answer in the first batch, prompts longer than the model's positions, or
            a run in ``config.out`` that has other settings or was not to be resumed.
        Interrupted: after a signal, once everything is saved.
    """
    config = config or Config()
    settings = Settings.of(config, recipe="score", model=name, task=task.name)
    progress = Progress(config.out, settings, {"step": 0, "report": {}}, resume, RunState)
    if config.two_turn_steps and not progress.begun:
        warm_up(model, task, config)
    start = load_model(Path(config.out) / START, model) if config.two_turn_steps else model
    base = copy.deepcopy(base or start).eval().requires_grad_(False)
    state, optimizer = progress.state, adamw(model, config.learning_rate, config.weight_decay)
    if progress.begun:
        progress.load(model, optimizer)
    test = task.sample(config.held_out, "test", torch.Generator().manual_seed(config.seed))
    total = config.first_steps + config.second_steps
    ends = {"base": 0, "stage I": config.first_steps or None, "stage II": total}
    with Signals() as signals, evaluating(model):  # no dropout: attempts are scored by the model that wrote them
        while True:
            for end, step in ends.items():
                if step == state["step"] and end not in state["report"]:
                    state["report"][end] = evaluate(model, base, task, test, config)
                    log_figures(f"{config.out}, {end}", state["report"][end])
                    if step == 0 and not state["report"][end]["accuracy_second"]:
                        LOG.warning(NO_SECOND_ATTEMPT)
            if state["step"] == ends["stage I"]:
                optimizer = adamw(model, config.learning_rate, config.weight_decay)
                save_model(Path(config.out) / FIRST, model, task, state["report"])
            if state["step"] == total:
                break
            progress.metrics.add(update(model, base, optimizer, task, config, state["step"]))
            state["step"] += 1
            progress.save_if(signals, config.save_every, model, optimizer)
    save_model(Path(config.out) / MODEL, model, task, state["report"])
    progress.save(model, optimizer)
    write_whole(Path(config.out) / REPORT, json.dumps(state["report"], indent=2) + "\n")
    plot(Path(config.out) / PLOT, state["report"], progress.metrics.lines, f"SCoRe, {task.name}")
    return model, state["report"]


def warm_up(model: PreTrainedModel, task: Task, config: Config) -> None:
    """Teach ``model`` to make second attempts, and save it."""
    folder, pace = Path(config.out) / START, Pace()

    def log(line: dict[str, Any]) -> None:
        if pace.due():
            log_figures(folder, line)

    numbers = (config.two_turn_problems, config.two_turn_steps, config.two_turn_rate)
    learn_two_turns(model, task, *numbers, config.sampling(config.temperature), config.seed, log)
    save_model(folder, model, task, {})


def evaluate(model: PreTrainedModel, base: PreTrainedModel, task: Task, test: Sequence[Row], config: Config) -> dict[str, Any]:
    """Greedy attempts at test problems, compared with each other and with votes.

    Returns:
        What ``Attempts.figures`` returns; changes, which is ``Attempts.histogram``; divergence_first and divergence_second,
        nats per token; and ``votes`` of attempts at ``config.temperature``.
    """
    greedy = attempt(model, task, test, config.sampling(0.0), config.seed)
    nats = torch.zeros(2)
    with torch.no_grad():
        for part in greedy.parts(config.batch_size):
            nats += loss(model, base, part, torch.zeros_like(part.rewards), 2, config)[1].sum(1).cpu()
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
    base: PreTrainedModel,
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
    attempts = attempt(model, task, rows, config.sampling(config.temperature), seed, base, config.from_base)
    if step == 0 and not attempts.rewards.any():
        raise ValueError(f"score: {nothing_solved(task, rows, attempts.first)}")
    earned = returns(attempts.rewards, stage, config)
    advantage = advantages(earned, config.samples, config.standardise)
    optimizer.zero_grad()
    losses, divergences = [], []
    for part, part_advantage in zip(attempts.parts(config.batch_size), advantage.split(config.batch_size, 1), strict=True):
        value, divergence = loss(model, base, part, part_advantage, stage, config)
        (value.sum() / len(rows)).backward()
        losses.append(value.detach())
        divergences.append(divergence)
    norm = clipped_step(optimizer, model, config.clip, f"score: update {step + 1}")
    tokens, own = attempts.tokens(), attempts.own.nonzero()[:, 0].tolist()
    first, second = (torch.cat(divergences, 1).sum(1).cpu() / tokens).tolist()
    return {
        "step": step + 1,
        "stage": stage,
        "loss": float(torch.cat(losses).mean()),
        "return_first": float(earned[0].mean()),
        "return_second": float(earned[1].mean()),
        "divergence_first": first,  # nats per token
        "divergence_second": second,
        **{name: x for name, x in attempts.part(own).figures().items() if name not in ("problems", "low", "high")},
        "grad_norm": norm,
        "tokens": int(tokens.sum()),
        "seconds": time.perf_counter() - began,
    }
