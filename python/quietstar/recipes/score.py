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
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.batches import mix_seed
from quietstar.files import write_whole
from quietstar.intervals import paired
from quietstar.recipes.models import option
from quietstar.recipes.progress import Progress
from quietstar.recipes.rounds import save_model
from quietstar.recipes.sampling import evaluating, padded, rollout
from quietstar.recipes.star import never
from quietstar.recipes.test_time import revision_prompt
from quietstar.runs import Signals
from quietstar.tasks import Row, Task

FIRST, MODEL, REPORT = "first-stage", "model", "score.json"  # what a run writes


@dataclass
class Config:
    """SCoRe's numbers; bonus and both divergences' weights as in the code of BY571/SCoRe.

    Raises:
        ValueError: a value outside its range, by name.
    """

    out: str = option("runs/score", "folder of the run; one that is there goes on where it stopped")
    first_steps: int = option(150, "updates of stage I; 0 leaves it out, a control")
    second_steps: int = option(150, "updates of stage II")
    problems: int = option(64, "problems of an update, drawn anew each time")
    samples: int = option(1, "attempts at each; with more than one they are compared among themselves, else over the batch")
    bonus: float = option(10.0, "alpha: the second attempt also earns this times its reward less the first's; 0 is a control")
    kl: float = option(0.01, "beta 1, weight of both attempts' divergence from the base model in stage II")
    first_kl: float = option(0.1, "beta 2, weight of the first attempt's divergence from the base model in stage I")
    credit: Literal["turn", "joint"] = option("turn", "turn: the first attempt earns its own reward; joint: the second's too")
    temperature: float = option(1.0, "of the attempts in training")
    max_new: int = option(64, "tokens of an attempt at most")
    learning_rate: float = option(1e-4, "of AdamW, constant")
    weight_decay: float = option(0.0, "of AdamW")
    clip: float = option(1.0, "largest gradient norm")
    held_out: int = option(400, "test problems for the accuracy of both attempts")
    batch_size: int = option(256, "attempts at once, in sampling and in training, for less memory")
    save_every: int = option(50, "updates between checkpoints")
    seed: int = option(0, "fixes problems and attempts")

    def __post_init__(self) -> None:
        for name in ("first_steps", "second_steps", "bonus", "kl", "first_kl", "weight_decay"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("problems", "samples", "max_new", "held_out", "batch_size", "save_every"):
            self._check(name, getattr(self, name) >= 1, "1 or more")
        for name in ("temperature", "learning_rate", "clip"):
            self._check(name, getattr(self, name) > 0, "above 0")
        self._check("problems", self.problems * self.samples > 1, "2 or more where samples is 1, for there is one baseline")

    def _check(self, name: str, ok: bool, wanted: str) -> None:
        if not ok:
            raise ValueError(f"score: {name} must be {wanted}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Attempts:
    """Two attempts at each of some problems.

    Attributes:
        prompts, first: ids of the problem and of the first attempt.
        requests, second: ids of all that stands before the second attempt, and of it.
        rewards: [2,R], 1 where an attempt is right.
    """

    rows: Sequence[Row]
    prompts: list[list[int]]
    first: list[list[int]]
    requests: list[list[int]]
    second: list[list[int]]
    rewards: Tensor

    def part(self, part: slice) -> Attempts:
        """Some of the problems."""
        prompts, first, requests, second = (x[part] for x in (self.prompts, self.first, self.requests, self.second))
        return Attempts(self.rows[part], prompts, first, requests, second, self.rewards[:, part])

    def figures(self) -> dict[str, float]:
        """accuracy_first, accuracy_second, delta = their difference with its 95 % interval, low and high, and over all problems
        the shares fixed (wrong, then right), broken (right, then wrong) and edited, and change, how much two attempts differ.
        """
        first, second = (x.bool().tolist() for x in self.rewards)
        compared = paired(second, first)
        n = len(first)
        pairs = zip(self.first, self.second, strict=True)
        changes = [1 - SequenceMatcher(None, *pair, autojunk=False).ratio() for pair in pairs]
        return {
            "problems": n,
            "accuracy_first": sum(first) / n,
            "accuracy_second": sum(second) / n,
            "delta": compared["difference"],
            "low": compared["low"],
            "high": compared["high"],
            "fixed": compared["first"] / n,
            "broken": compared["second"] / n,
            "edited": sum(change > 0 for change in changes) / n,
            "change": sum(changes) / n,
        }


def attempt(model: PreTrainedModel, task: Task, rows: Sequence[Row], config: Config, temperature: float, seed: int) -> Attempts:
    """Two attempts at each row, the second one of which sees the first."""
    sampling: dict[str, Any] = {"temperature": temperature, "max_new": config.max_new, "batch_size": config.batch_size}
    prompts = [row.prompt_ids for row in rows]
    first = [several[0].ids for several in rollout(model, task, prompts, **sampling, seed=mix_seed(seed, 0))]
    requests = [revision_prompt(task, row, [task.trimmed(ids)]) for row, ids in zip(rows, first, strict=True)]
    second = [several[0].ids for several in rollout(model, task, requests, **sampling, seed=mix_seed(seed, 1))]
    right = [[task.check(row, ids) for row, ids in zip(rows, several, strict=True)] for several in (first, second)]
    return Attempts(rows, prompts, first, requests, second, torch.tensor(right, dtype=torch.float32))


def returns(rewards: Tensor, stage: int, config: Config) -> Tensor:
    """What attempts earn, [2,R], given which of them are right: nothing for the first in stage I, with a bonus in stage II."""
    first, second = rewards
    if stage == 1:
        first = torch.zeros_like(first)
    else:
        second = second + config.bonus * (second - first)
    return torch.stack([first + second if config.credit == "joint" else first, second])


def advantages(returns: Tensor, samples: int) -> Tensor:
    """Returns [2,R] less the mean of the other samples of a problem, or of the other problems where there is one sample."""
    groups = returns.unflatten(1, (-1, samples)) if samples > 1 else returns[:, None]
    n = groups.shape[2]
    return ((groups - groups.mean(2, keepdim=True)) * n / (n - 1)).flatten(1)


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
    """The loss of each problem [R], and the divergence of both attempts [2,R], without a gradient."""
    advantage = advantage.to(model.device)
    logprob, divergence = read(model, reference, attempts.prompts, attempts.first)
    logprob_second, divergence_second = read(model, reference, attempts.requests, attempts.second)
    policy = -advantage[0] * logprob - advantage[1] * logprob_second
    held = config.first_kl * divergence if stage == 1 else config.kl * (divergence + divergence_second)
    return policy + held, torch.stack([divergence, divergence_second]).detach()


def score(
    model: PreTrainedModel, task: Task, config: Config | None = None, name: str = "", resume: bool = False
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Run both stages, or what a stopped run lacks; ``model`` is changed.

    Writes the model after stage I (first-stage) and at the end (model), metrics.jsonl, a line an update, and the report
    (score.json) into ``config.out``. SIGTERM and Ctrl-C finish the update and save.

    Args:
        model: writes an answer, and after a request a second one; it is also the base that the divergence is from.
        name: of the model, which a run that goes on must have begun with.
        resume: go on with the run in ``config.out``, if there is one.

    Returns:
        The model and the report: ``Attempts.figures`` of greedy attempts on test problems, for "base", "stage I", "stage II".

    Raises:
        ValueError: no right answer in the first batch, prompts that pass the model's positions, or a run in ``config.out`` that
            is another one or that ``resume`` doesn't ask for.
        Interrupted: after a signal, once all is saved.
    """
    config = config or Config()
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    settings = {"recipe": "score", "model": name, "task": task.name, **asdict(config)}
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
                    state["report"][end] = attempt(model, task, test, config, 0.0, config.seed).figures()
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
    return model, state["report"]


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
    attempts = attempt(model, task, rows, config, config.temperature, seed)
    if step == 0 and not attempts.rewards.any():
        raise ValueError(f"score: {never(task, rows, attempts.first)}")
    earned = returns(attempts.rewards, stage, config)
    advantage = advantages(earned, config.samples)
    optimizer.zero_grad()
    losses, divergences = [], []
    for start in range(0, len(rows), config.batch_size):
        part = slice(start, start + config.batch_size)
        value, divergence = loss(model, reference, attempts.part(part), advantage[:, part], stage, config)
        (value.sum() / len(rows)).backward()
        losses.append(value.detach())
        divergences.append(divergence)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    if not bool(norm.isfinite()):
        raise FloatingPointError(f"score: the gradient is {float(norm)} at update {step + 1}")
    optimizer.step()
    tokens = [sum(map(len, several)) for several in (attempts.first, attempts.second)]
    nats = torch.cat(divergences, 1).sum(1).tolist()
    return {
        "step": step + 1,
        "stage": stage,
        "loss": float(torch.cat(losses).mean()),
        "return_first": float(earned[0].mean()),
        "return_second": float(earned[1].mean()),
        "divergence_first": nats[0] / tokens[0],  # nats a token
        "divergence_second": nats[1] / tokens[1],
        **{name: x for name, x in attempts.figures().items() if name not in ("problems", "low", "high")},
        "grad_norm": float(norm),
        "tokens": sum(tokens),
        "seconds": time.perf_counter() - began,
    }


def new_optimizer(model: PreTrainedModel, config: Config) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
