"""Implicit chain of thought by distillation (ICoT-KD, arXiv 2311.01460), the baseline of stepwise internalisation.

Three models of the same architecture. A teacher writes chains; its states along the diagonal, from the start of the chain in
the first layer to its end in the last one, stand for what the chain says. (a) A student that is shown these states answers from
the prompt. (b) An emulator predicts them from the prompt alone. (c) Emulator and student are trained together on the answer.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from quietstar.arguments.fields import check_at_least, check_positive, check_types
from quietstar.checkpoints.pretrained import load_model as load_language_model
from quietstar.config import option
from quietstar.files.writing import replaced, write_whole
from quietstar.recipes import internalize as icot
from quietstar.recipes import internalize_report as icot_report
from quietstar.recipes.common.log import LOG, log_figures
from quietstar.recipes.common.logprobs import evaluating, logprob, padded
from quietstar.recipes.common.optimization import adamw, clipped_step
from quietstar.recipes.common.progress import Progress
from quietstar.recipes.common.rounds import save_model
from quietstar.recipes.common.sampling import Completion, rollout
from quietstar.recipes.internalize_states import Emulator, Student, diagonal, emulation_loss
from quietstar.recipes.tasks import Row, Task
from quietstar.run.batches import mix_seed, texts_of_step
from quietstar.run.lock import alone_in_out
from quietstar.run.resume import Settings
from quietstar.run.signals import Signals

__all__ = ["Config", "distill"]

MODEL, PAIR, STATES, NAME = "model", "pair", "states.safetensors", "kd"  # what a run writes; the last is .json and .png
COUPLED = "coupled"  # the phase that trains both together
BATCH = 256  # problems at once in evaluation
Loss = Callable[[Sequence[Row]], Tensor]
Measured = Callable[[], dict[str, Any]]


@dataclass
class Config:
    """Updates of (a), (b) and (c); those of the teacher and all other options are those of ``internalize.Config``.

    (c) takes most of them by default. The published commands train the teacher for 1 epoch, (a) for 7, (b) for 6 and (c) for up
    to 40, which is 74 % (README of da03/implicit_chain_of_thought, 4 x 4 digits).

    Raises:
        ValueError: a value outside its range, by name.
    """

    student_steps: int = option(1500, "updates of the student that is shown the teacher's states")
    emulator_steps: int = option(1500, "updates of the emulator, which predicts these states from the prompt")
    coupled_steps: int = option(6000, "updates of both together, on the answer")
    coupled_rate: float = option(
        0.3,
        "that phase's learning rate, times that of the others; with 1, as published, a small model doesn't converge",
    )
    components: int = option(1, "M, components of the emulator's mixture; more than 1 where a problem has several chains")

    def __post_init__(self) -> None:
        check_types("internalize", self)
        check_at_least("internalize", self, 1, ("student_steps", "emulator_steps", "coupled_steps", "components"))
        check_positive("internalize", self, ("coupled_rate",))


class Pair(nn.Module):
    """Emulator and student, which together answer from the prompt alone."""

    def __init__(self, emulator: Emulator, student: Student):
        super().__init__()
        self.emulator, self.student = emulator, student

    @torch.no_grad()
    def answer(self, task: Task, prompts: Sequence[list[int]], max_new: int, states: Tensor | None = None) -> list[Completion]:
        """Greedy answers, with the emulator's states or with given ones [B,layers,D]."""
        found: dict[int, Completion] = {}
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the order of rollout
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            batch = [prompts[i] for i in chosen]
            read = self.emulator(batch) if states is None else states[chosen]
            with self.student.reading(read, len(batch[0]) - 1):
                written = rollout(self.student.model, task, batch, temperature=0.0, max_new=max_new, batch_size=BATCH)
            found |= {i: completions[0] for i, completions in zip(chosen, written, strict=True)}
        return [found[i] for i in range(len(prompts))]

    def save_pretrained(self, folder: str | Path, task: Task) -> None:
        """Write two ordinary checkpoints, emulator and student, and next to them the weights that pass the states on."""
        with replaced(folder) as temporary:
            for name, part in (("emulator", self.emulator), ("student", self.student)):
                part.model.save_pretrained(temporary / name)
                task.tokenizer.save_pretrained(temporary / name)
            own = {key: x.contiguous() for key, x in self.state_dict().items() if ".model." not in key}
            save_file(own, temporary / STATES, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Pair:
        """Load what ``save_pretrained`` wrote. Raises ValueError if it is missing or incomplete."""
        folder = Path(folder)
        try:
            own = load_file(folder / STATES)
            emulator, student = (load_language_model(folder / name) for name in ("emulator", "student"))
            pair = cls(Emulator(emulator, len(own["emulator.mixture.weight"])), Student(student))
            missing = [key for key in pair.load_state_dict(own, strict=False).missing_keys if ".model." not in key]
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise ValueError(f"{folder}: no emulator and student load from there: {str(error).splitlines()[0]}") from error
        if missing:
            raise ValueError(f"{folder}: {STATES} lacks {missing[0]}")
        return pair.eval()


@alone_in_out(icot.Config)
def distill(
    model: PreTrainedModel,
    task: Task,
    config: icot.Config | None = None,
    kd: Config | None = None,
    name: str = "",
    resume: bool = False,
) -> tuple[Pair, dict[str, Any]]:
    """Train teacher, student, emulator and both together, or what a stopped run lacks; ``model`` stays as it is.

    Writes the teacher, the pair (pair), a folder for each phase, and the report (kd.json and, with matplotlib, kd.png) into
    ``config.out``.

    Args:
        model: what all three start from.
        config: ``explicit_steps`` are the teacher's updates; options about removing tokens have no effect here. With a
            ``gate``, teacher and student train on until that share of held-out answers is right, measured every ``eval_every``
            updates, for at most ``gate_rounds`` times as long. If it never is, the log says so, and the next phase begins.
        name: the model's name; a resumed run must have started with the same one.
        resume: continue the run in ``config.out``, if there is one.

    Returns:
        The pair and the report, which holds what ``internalize.evaluate`` returns on test problems, and "steps", the updates of
        the phase: "full chain" of the teacher, "shown states" of the student with the teacher's states, "emulated states"
        before and "internalized" after the two are trained together. "emulation" is the emulator's mean squared error in each
        layer, of normalised states, so that predicting nothing has error 1.

    Raises:
        ValueError: as ``internalize.internalize``; a model whose layers can't be found.
        Interrupted: after a signal, once everything is saved.
    """
    config, kd = config or icot.Config(), kd or Config()
    generator = torch.Generator().manual_seed(config.seed)
    training, test, valid = (
        task.sample(n, split, generator)
        for n, split in ((config.rows, "train"), (config.held_out, "test"), (config.held_out, "valid"))
    )
    icot.check_rows(model, task, [*training, *test, *valid], config)
    settings = Settings.of(config, kd, recipe="internalize kd", model=name, task=task.name)
    teacher = copy.deepcopy(model)
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)  # for the new weights that pass the states on
        pair = Pair(Emulator(copy.deepcopy(model), kd.components), Student(copy.deepcopy(model)))

    def train(number: int, phase: str, module: nn.Module, steps: int, loss: Loss, measured: Measured | None = None) -> int:
        progress = Progress(Path(config.out) / phase, settings, {"step": 0, "passed": False}, resume)
        own = replace(config, learning_rate=config.learning_rate * kd.coupled_rate) if phase == COUPLED else config
        return train_phase(progress, module, steps, loss, training, own, mix_seed(config.seed, number), measured)

    def shown(rows: Sequence[Row]) -> Tensor:
        return teacher_states(teacher, task, rows)

    def answer_loss(rows: Sequence[Row], states: Tensor) -> Tensor:
        prompts = [row.prompt_ids for row in rows]
        with pair.student.reading(states, max(map(len, prompts)) - 1):
            return completion_loss(pair.student.model, prompts, [icot.shortened(task, row, len(row.cot_ids)) for row in rows])

    def chain_loss(rows: Sequence[Row]) -> Tensor:
        return completion_loss(teacher, [row.prompt_ids for row in rows], [task.completion_ids(row) for row in rows])

    def emulate(rows: Sequence[Row]) -> Tensor:
        return pair.emulator([row.prompt_ids for row in rows])

    report: dict[str, Any] = {}

    def found(row: str, steps: int, figures: dict[str, Any]) -> None:
        report[row] = {"steps": steps, **figures}
        log_figures(f"{config.out}, {row}", figures)

    def written(rows: Sequence[Row]) -> dict[str, Any]:
        return icot.evaluate(teacher, task, rows, 0, config)

    def read(rows: Sequence[Row]) -> dict[str, Any]:
        return evaluate(pair, task, rows, shown(rows))

    steps = train(0, "teacher", teacher, config.explicit_steps, chain_loss, lambda: written(valid))
    save_model(Path(config.out) / "teacher" / MODEL, teacher, task, {})
    found("full chain", steps, written(test))
    steps = train(1, "student", pair.student, kd.student_steps, lambda x: answer_loss(x, shown(x)), lambda: read(valid))
    found("shown states", steps, read(test))
    steps = train(2, "emulator", pair.emulator, kd.emulator_steps, lambda x: emulation_loss(emulate(x), shown(x)))
    found("emulated states", steps, evaluate(pair, task, test))
    with torch.no_grad():
        report["emulation"] = (emulate(test) - shown(test)).square().mean((0, 2)).tolist()
    steps = train(3, COUPLED, pair, kd.coupled_steps, lambda x: answer_loss(x, emulate(x)))
    found("internalized", steps, evaluate(pair, task, test))
    pair.save_pretrained(Path(config.out) / PAIR, task)
    write_whole(Path(config.out) / f"{NAME}.json", json.dumps(report, indent=2) + "\n")
    icot_report.plot_distillation(Path(config.out) / f"{NAME}.png", report, task.name)
    return pair, report


def train_phase(
    progress: Progress,
    module: nn.Module,
    steps: int,
    loss: Loss,
    training: Sequence[Row],
    config: icot.Config,
    seed: int,
    measured: Measured | None = None,
) -> int:
    """Train one of the models, or the pair, in place; without dropout, as the published code does. Returns the updates.

    Args:
        measured: returns the accuracy that has to reach ``config.gate``; None where no gate applies.
    """
    optimizer = adamw(module, config.learning_rate, config.weight_decay)
    if progress.begun:
        progress.load(module, optimizer)
    state = progress.state
    most = steps * (config.gate_rounds if measured and config.gate else 1)
    module.eval()
    with Signals() as signals:
        while state["step"] < most and not state["passed"]:
            began = time.perf_counter()
            rows = [training[i] for i in texts_of_step(len(training), config.batch_size, seed, state["step"])]
            value = loss(rows)
            optimizer.zero_grad()
            value.backward()
            norm = clipped_step(optimizer, module, config.clip, f"internalize: update {state['step'] + 1}")
            state["step"] += 1
            figures = {"loss": float(value.detach()), "grad_norm": norm, "seconds": time.perf_counter() - began}
            beyond = state["step"] - steps  # the schedule
            if measured and config.gate and beyond >= 0 and (beyond % config.eval_every == 0 or state["step"] == most):
                figures["accuracy"] = measured()["accuracy"]
                state["passed"] = figures["accuracy"] >= config.gate
                if state["step"] == most and not state["passed"]:
                    LOG.info("%s: below the gate, %g, after %s updates", progress.folder.parent, config.gate, f"{most:,}")
            progress.metrics.add({"step": state["step"], **figures})
            progress.save_if(signals, config.save_every, module, optimizer)
    progress.save(module, optimizer)
    return state["step"]


def completion_loss(model: PreTrainedModel, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> Tensor:
    """Mean loss of the completions' tokens, nats."""
    values, mask = logprob(model, prompts, completions)
    return -values.sum() / mask.sum()


@torch.no_grad()
def teacher_states(teacher: PreTrainedModel, task: Task, rows: Sequence[Row]) -> Tensor:
    """[B,layers,D], along the diagonal from the prompt's last token to the separator after the chain."""
    ids, mask = (x.to(teacher.device) for x in padded([row.prompt_ids + task.completion_ids(row) for row in rows]))
    first = torch.tensor([len(row.prompt_ids) - 1 for row in rows], device=ids.device)
    chain = torch.tensor([len(row.cot_ids) + len(task.separator_ids) for row in rows], device=ids.device)
    with evaluating(teacher):
        out = teacher(ids, attention_mask=mask.long(), output_hidden_states=True, use_cache=False)
    return diagonal(out.hidden_states, first, first + chain)


def evaluate(pair: Pair, task: Task, rows: Sequence[Row], states: Tensor | None = None) -> dict[str, Any]:
    """As ``internalize.evaluate``: answers from the prompt with the emulator's states, or with given ones [B,layers,D]."""
    most = max(len(icot.shortened(task, row, len(row.cot_ids))) for row in rows) + icot.EXTRA_TOKENS
    began = time.perf_counter()
    written = pair.answer(task, [row.prompt_ids for row in rows], most, states)
    return icot_report.figures(task, rows, written, time.perf_counter() - began)
