"""SCoRe: a model learns to correct itself, by reinforcement learning over two attempts at each problem (arXiv 2409.12917).

The second attempt sees the first and a fixed request to look again, which does not say whether the first was right. Stage I
rewards only the second attempt and keeps the first close to the base model, so that there are still mistakes to correct. Stage
II rewards both, and the second one more for what it improves on the first; without that bonus a model learns to answer once and
repeat it. What both stages optimise is in ``objective``; what they are compared with, in ``baselines``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from quietstar.config import option
from quietstar.hf.modules import dropout_off
from quietstar.run.batches import mix_seed
from quietstar.run.lock import alone_in_out
from quietstar.run.metrics import Pace
from quietstar.run.resume import Settings
from quietstar_kernels.checks import check, check_at_least, check_positive
from quietstar_recipes.common.evaluation import nothing_solved
from quietstar_recipes.common.log import LOG, log_figures
from quietstar_recipes.common.sampling import rollout
from quietstar_recipes.common.saving import Progress, hashes, load_model, save_model, write_json
from quietstar_recipes.common.solutions import revision_prompt
from quietstar_recipes.common.training import SFTConfig, adamw, sft, train
from quietstar_recipes.score.attempts import Update, accuracy_by_attempt, attempt, plot, votes
from quietstar_recipes.score.objective import Objective, advantages, by_turn, divergence, log_ratios, loss
from quietstar_recipes.tasks import Row, Task

START, BEST, FIRST, MODEL = "two-turns", "best", "first-stage", "model"  # checkpoints of a run
REPORT, PLOT = "score.json", "score.png"
NO_SECOND_ATTEMPT = (
    "score: no second attempt is right, so there is nothing to reward: two_turn_steps=200 first teaches the model to make one"
)


@dataclass
class Config(Objective):
    """The options of SCoRe."""

    out: str = option("runs/score", "folder of the run", may_differ=True)
    two_turn_steps: int = option(
        0, "supervised updates before stage I, for a model that has never made a second attempt; 0 if it does"
    )
    two_turn_problems: int = option(2000, "training problems that it attempts twice for these updates")
    two_turn_rate: float = option(5e-4, "peak learning rate of these updates")
    first_steps: int = option(150, "updates of stage I; 0 leaves it out, a control")
    second_steps: int = option(150, "updates of stage II")
    problems: int = option(32, "problems per update, drawn anew each time")
    samples: int = option(4, "attempts at each problem; several are compared with each other, one with the rest of the batch")
    from_base: float = option(
        0.0, "share of training's first attempts that the base model writes, for more kinds of mistakes; 1 is a control"
    )
    temperature: float = option(1.0, "sampling temperature of the attempts in training, and of those that vote")
    max_new: int = option(64, "most tokens in an attempt")
    learning_rate: float = option(1e-4, "learning rate of AdamW, constant")
    weight_decay: float = option(0.0, "weight decay of AdamW")
    clip: float = option(1.0, "largest gradient norm")
    held_out: int = option(400, "test problems for the accuracy of both attempts")
    chains: int = option(4, "pairs of attempts at each of them that vote, against as many parallel tokens; 0 for none")
    batch_size: int = option(256, "attempts at once, in sampling and in training; fewer take less memory")
    attempts: int = option(5, "attempts in a row at each test problem, for the accuracy of each; 2 or more")
    keep: Literal["best", "last"] = option(
        "best", "checkpoint that a stage ends with. best: that of the highest training reward, over the updates since the last"
    )
    save_every: int = option(50, "updates between checkpoints")
    seed: int = option(0, "fixes problems and attempts")

    def __post_init__(self) -> None:
        Objective.__post_init__(self)
        none_allowed = ("two_turn_steps", "first_steps", "second_steps", "weight_decay", "chains")
        check_at_least("score", self, 0, none_allowed)
        at_least_one = ("two_turn_problems", "problems", "samples", "max_new", "held_out", "batch_size", "save_every")
        check_at_least("score", self, 1, at_least_one)
        check_positive("score", self, ("two_turn_rate", "temperature", "learning_rate", "clip"))
        check("score", self, "from_base", 0 <= self.from_base <= 1, "from 0 to 1")
        check("score", self, "attempts", self.attempts >= 2, "2 or more")
        alone = not (self.single_turn and self.first_steps)
        check("score", self, "first_steps", alone, "0 with single_turn, since stage I rewards second attempts")
        enough = self.problems * self.samples > 1
        check("score", self, "problems", enough, "2 or more where samples is 1, since attempts are compared with each other")

    def sampling(self, temperature: float) -> dict[str, Any]:
        """The arguments of ``rollout``, except the seed."""
        return {"temperature": temperature, "max_new": self.max_new, "batch_size": self.batch_size}


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

    Writes the model after the warm-up (two-turns), after stage I (first-stage) and at the end (model), the best checkpoint of
    the latest stage (best), metrics.jsonl with a line per update of the stages, and the report with its plots (score.json,
    score.png) into ``config.out``. Updates of the warm-up are not saved: a continued run repeats them.

    Args:
        model: writes an answer, and a second one when asked to.
        base: the model that the divergence is measured from; default ``model`` as it is passed, or after the warm-up. For stage
            II alone, what stage I started with.

    Returns:
        The model and the report, which holds what ``evaluate`` returns under "base", "stage I" and "stage II".

    Raises:
        ValueError: no right answer in the first batch, or prompts longer than the model's positions.
    """
    config = config or Config()
    # 1. The start: a model that makes second attempts, a copy that stays as it is, and the optimizer.
    settings = Settings.of(config, recipe="score", model=name, task=task.name, inputs=hashes(task, model, name))
    progress = Progress(config.out, settings, {"step": 0, "best": None, "report": {}}, resume, Update)
    if config.two_turn_steps and not progress.begun:
        learn_two_turns(model, task, config)
        save_model(Path(config.out) / START, model, task, {})
    start = load_model(Path(config.out) / START, model) if config.two_turn_steps else model
    reference = copy.deepcopy(base or start).eval().requires_grad_(False)
    state, optimizer = progress.state, adamw(model, config.learning_rate, config.weight_decay)
    progress.load(model, optimizer)
    # 2. What is measured when, and the stages up to there.
    test = task.sample(config.held_out, "test", torch.Generator().manual_seed(config.seed))
    total = config.first_steps + config.second_steps
    ends = {"base": 0, "stage I": config.first_steps or None, "stage II": total if config.second_steps else None}

    def after(line: dict[str, Any]) -> None:
        if config.keep == "best" and (state["step"] % config.save_every == 0 or state["step"] in ends.values()):
            keep_best(model, task, config, state, [*progress.metrics.lines, line])

    with dropout_off(model):  # no dropout: attempts are scored by the model that wrote them
        for end, step in ends.items():
            if step is None or step < state["step"]:
                continue
            gradient = partial(attempt_gradient, model, reference, task, config)
            options: dict[str, Any] = {"clip": config.clip, "progress": progress, "save_every": config.save_every}
            train(model, optimizer, step, gradient, name="score", after=after, **options)
            if state["best"]:
                model.load_state_dict(load_model(Path(config.out) / BEST, model).state_dict())
            if end not in state["report"]:
                state["report"][end] = evaluate(model, reference, task, test, config)
                log_figures(f"{config.out}, {end}", state["report"][end])
                if step == 0 and not state["report"][end]["accuracy_second"]:
                    LOG.warning(NO_SECOND_ATTEMPT)
            if end == "stage I":
                state["best"] = None
                optimizer = adamw(model, config.learning_rate, config.weight_decay)
                save_model(Path(config.out) / FIRST, model, task, state["report"])
                progress.save(model, optimizer)  # before stage II overwrites the best checkpoint
    # 3. What is left at the end.
    save_model(Path(config.out) / MODEL, model, task, state["report"])
    progress.save(model, optimizer)
    write_json(Path(config.out) / REPORT, state["report"])
    plot(Path(config.out) / PLOT, state["report"], progress.metrics.lines, f"SCoRe, {task.name}")
    return model, state["report"]


def learn_two_turns(model: PreTrainedModel, task: Task, config: Config) -> None:
    """Teach ``model``, in place, that a request for another attempt is followed by another attempt.

    Both attempts are the model's own, drawn independently of each other. So it still makes the mistakes that are to be
    corrected, and its second attempts take no notice of the first: they break right answers as often as they fix wrong ones.
    Like a model that was never trained to correct itself, it gains nothing from being asked again.
    """
    folder, pace = Path(config.out) / START, Pace()
    generator = torch.Generator().manual_seed(mix_seed(config.seed, 2000))
    rows = task.sample(config.two_turn_problems, "train", generator)
    pairs = rollout(model, task, [row.prompt_ids for row in rows], 2, **config.sampling(config.temperature), seed=config.seed)
    examples = []
    for row, pair in zip(rows, pairs, strict=True):
        first, second = (task.trimmed(completion.ids) for completion in pair)
        examples += [(row.prompt_ids, first), (revision_prompt(task, row, [first]), second)]

    def log(line: dict[str, Any]) -> None:
        if pace.due():
            log_figures(folder, line)

    sft(model, examples, config.two_turn_steps, SFTConfig(learning_rate=config.two_turn_rate), config.seed, log)


def keep_best(
    model: PreTrainedModel, task: Task, config: Config, state: dict[str, Any], lines: Sequence[Mapping[str, Any]]
) -> None:
    """Save a checkpoint if the reward since the one before is the highest of the stage.

    The reward is that of both attempts without the bonus, which shapes the gradient and is highest where first attempts fail.
    """
    since = (state["step"] - 1) // config.save_every * config.save_every
    reward = fmean(line["reward"] for line in lines if line["step"] > since and line["stage"] == lines[-1]["stage"])
    if state["best"] is None or reward > state["best"]["reward"]:
        state["best"] = {"step": state["step"], "reward": reward}
        save_model(Path(config.out) / BEST, model, task, state["best"])


def evaluate(model: PreTrainedModel, base: PreTrainedModel, task: Task, test: Sequence[Row], config: Config) -> dict[str, Any]:
    """Greedy attempts at test problems, compared with each other and with votes.

    Returns:
        What ``Attempts.figures`` returns; accuracy_by_attempt; divergence_first and divergence_second, nats per token; and
        ``votes`` of attempts at ``config.temperature``.
    """
    greedy = attempt(model, task, test, config.sampling(0.0), config.seed)
    nats = torch.zeros(2)
    with torch.no_grad():
        for part in greedy.parts(config.batch_size):
            scored = by_turn(model, list(part.turns()), partial(divergence, model, base))
            nats += torch.stack([of_turn.sum() for of_turn in scored]).cpu()
    first, second = (nats / greedy.tokens()).tolist()
    return {
        **greedy.figures(),
        "accuracy_by_attempt": accuracy_by_attempt(model, task, greedy, config.attempts, config.sampling(0.0), config.seed),
        "divergence_first": first,
        "divergence_second": second,
        "votes": votes(model, task, test, config.chains, config.sampling(config.temperature), config.seed),
    }


def attempt_gradient(model: PreTrainedModel, base: PreTrainedModel, task: Task, config: Config, step: int) -> dict[str, Any]:
    """Attempt new problems and leave the gradient of the loss in the model; returns the figures of the update."""
    seed, stage = mix_seed(config.seed, step), 1 if step < config.first_steps else 2
    problems = task.sample(config.problems, "train", torch.Generator().manual_seed(seed))
    rows = [row for row in problems for _ in range(config.samples)]
    attempts = attempt(model, task, rows, config.sampling(config.temperature), seed, base, config.from_base)
    if step == 0 and not attempts.rewards.any():
        raise ValueError(f"score: {nothing_solved(task, rows, attempts.first)}")
    ratios = log_ratios(base, attempts, config.batch_size)
    earned = config.returns(attempts.rewards, stage, config.weights(stage)[:, None] * ratios)
    advantage = advantages(earned, config.samples)
    losses = []
    for part, part_advantage in zip(attempts.parts(config.batch_size), advantage.split(config.batch_size, 1), strict=True):
        value = loss(model, part, part_advantage, config.single_turn)
        (value.sum() / len(rows)).backward()
        losses.append(value.detach())
    tokens = attempts.tokens()
    own = attempts.own.nonzero()[:, 0].tolist() or range(len(rows))
    first, second = (ratios.sum(1) / tokens).tolist()
    return {
        "stage": stage,
        "loss": float(torch.cat(losses).mean()),
        "reward": float(config.earned(attempts.rewards, stage).sum(0).mean()),  # without bonus and divergence
        "return_first": float(earned[0].mean()),
        "return_second": float(earned[1].mean()),
        "divergence_first": first,  # nats per token
        "divergence_second": second,
        **{name: x for name, x in attempts.part(own).figures().items() if name not in ("problems", "low", "high")},
        "tokens_first": int(tokens[0]),
        "tokens": int(tokens.sum()),
    }
