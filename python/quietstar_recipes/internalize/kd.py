"""Implicit chain of thought by distillation (ICoT-KD, arXiv 2311.01460), the baseline of stepwise internalisation.

Three models of the same architecture. A teacher writes chains; its states along the diagonal, from the start of the chain in
the first layer to its end in the last one, stand for what the chain says. (a) A student that is shown these states answers from
the prompt. (b) An emulator predicts them from the prompt alone. (c) Emulator and student are trained together on the answer.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from transformers import PreTrainedModel

from quietstar.checkpoints.pretrained import load_model as load_language_model
from quietstar.checkpoints.pretrained import save_model as save_language_model
from quietstar.config import option
from quietstar.files.reading import reason_of
from quietstar.files.writing import replaced
from quietstar.hf.modules import dropout_off
from quietstar.run.batches import mix_seed, texts_of_step
from quietstar.run.lock import alone_in_out
from quietstar.run.resume import Settings
from quietstar_kernels.checks import check_at_least, check_positive, check_types
from quietstar_recipes.common.log import log_figures
from quietstar_recipes.common.logprobs import padded, positions
from quietstar_recipes.common.plots import Panel, panels
from quietstar_recipes.common.sampling import Completion, rollout
from quietstar_recipes.common.saving import Progress, hashes, save_model, write_json
from quietstar_recipes.common.training import adamw, completion_loss, train
from quietstar_recipes.internalize import stepwise as icot
from quietstar_recipes.tasks import Row, Task

MODEL, PAIR, STATES, NAME = "model", "pair", "states.safetensors", "kd"  # what a run writes; the last is .json and .png
NAMES = TEACHER, STUDENT, EMULATOR, COUPLED = "teacher", "student", "emulator", "coupled"  # the phases, and their folders
BATCH = 256  # problems at once in evaluation
MIXTURE_TEMPERATURE = 0.05  # as in the published code


@dataclass
class Config:
    """Updates of (a), (b) and (c); those of the teacher and all other options are those of ``internalize.Config``.

    (c) takes most of them by default. The published commands train the teacher for 1 epoch, (a) for 7, (b) for 6 and (c) for up
    to 40, which is 74 % (README of da03/implicit_chain_of_thought, 4 x 4 digits).
    """

    student_steps: int = option(1500, "updates of the student that is shown the teacher's states")
    emulator_steps: int = option(1500, "updates of the emulator, which predicts these states from the prompt")
    coupled_steps: int = option(6000, "updates of both together, on the answer")
    coupled_rate: float = option(
        0.3, "that phase's learning rate, times that of the others; with 1, as published, a small model doesn't converge"
    )
    components: int = option(1, "M, components of the emulator's mixture; more than 1 where a problem has several chains")

    def __post_init__(self) -> None:
        check_types("internalize", self)
        check_at_least("internalize", self, 1, ("student_steps", "emulator_steps", "coupled_steps", "components"))
        check_positive("internalize", self, ("coupled_rate",))


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a causal language model. Raises ValueError if it has no module list that holds exactly them."""
    wanted = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise ValueError(f"internalize: {type(model).__name__} has no list of its {wanted} layers to write states into")


def diagonal(hidden_states: tuple[Tensor, ...], first: Tensor, last: Tensor) -> Tensor:
    """The teacher's states [B,layers,D]: the input of layer l at a position that moves from ``first`` to ``last`` as l grows.

    Each row has its own positions, since chains differ in length. States are normalised without parameters.

    Args:
        hidden_states: [B,L,D], the input of each layer and one more, as ``output_hidden_states`` returns them.
        first, last: int64 [B], positions of the separators before and after the chain.
    """
    layers = len(hidden_states) - 1
    share = torch.linspace(0, 1, layers, dtype=torch.float64, device=first.device)
    place = (first[:, None] + share * (last - first)[:, None]).round().long()  # [B,layers]
    rows = torch.arange(len(first), device=first.device)
    states = torch.stack([hidden_states[l][rows, place[:, l]] for l in range(layers)], 1)
    return layer_norm(states, states.shape[-1:])


@contextmanager
def writing(model: PreTrainedModel, place: int, state: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """In this context, the input of layer l at column ``place`` is ``state(l, its previous value)``, [B,D].

    Decoding with a cache, one token at a time, is left as it is.
    """

    def before(l: int) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.shape[1] == 1:
                return None
            new = state(l, hidden[:, place]).to(hidden.dtype)
            hidden = torch.cat([hidden[:, :place], new[:, None], hidden[:, place + 1 :]], 1)
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        return hook

    with ExitStack() as hooks:
        for l, layer in enumerate(decoder_layers(model)):
            hooks.enter_context(layer.register_forward_pre_hook(before(l), with_kwargs=True))
        yield


def perceptrons(model: PreTrainedModel, inputs: int) -> nn.ModuleList:
    """One two-layer perceptron per layer, from ``inputs`` * D over 4 D to D, the size of a hidden state."""
    D, layers = model.config.get_text_config().hidden_size, len(decoder_layers(model))
    return nn.ModuleList(nn.Sequential(nn.Linear(inputs * D, 4 * D), nn.ReLU(), nn.Linear(4 * D, D)) for _ in range(layers))


class Student(nn.Module):
    """A language model into which one state per layer is written, at the separator after the prompt."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model, self.perceptrons = model, perceptrons(model, 1)
        self.to(model.device, model.dtype)

    def reading(self, states: Tensor, place: int) -> Any:
        """In this context, the model reads ``states`` [B,layers,D] at column ``place``."""
        return writing(self.model, place, lambda l, _: self.perceptrons[l](states[:, l]))


class Emulator(nn.Module):
    """Predicts the teacher's states from the prompt: a language model with a mixture, and a memory that runs over the layers.

    Args:
        components: M, components of the mixture; 1 if there is one way to reason.
    """

    def __init__(self, model: PreTrainedModel, components: int = 1):
        super().__init__()
        self.model, self.perceptrons = model, perceptrons(model, 2)
        D = model.config.get_text_config().hidden_size
        self.mixture = nn.Embedding(components, D)
        self.memory = nn.LSTMCell(D, D)
        self.query, self.key = nn.Linear(D, D), nn.Linear(D, D)
        self.write = nn.Linear(2 * D, D)
        self.to(model.device, model.dtype)

    def forward(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The states [B,layers,D] predicted at the last token of each prompt."""
        ids, mask = (x.to(self.model.device) for x in padded(prompts, left=True))
        states: list[Tensor] = []
        keys: list[Tensor] = []
        memory: tuple[Tensor, Tensor] | None = None
        context: Tensor | None = None

        def state(l: int, hidden: Tensor) -> Tensor:
            """Predict the state of layer l, and return what to write there for later layers to read."""
            nonlocal memory, context
            component = (hidden @ self.mixture.weight.T / MIXTURE_TEMPERATURE).softmax(-1) @ self.mixture.weight
            states.append(self.perceptrons[l](torch.cat([hidden, component], -1)))
            context = torch.zeros_like(hidden) if context is None else context
            memory = self.memory(states[-1] + context, memory)
            if keys:
                earlier = torch.stack(keys, 1)  # [B,l,D]
                weights = (earlier @ self.query(memory[0])[..., None]).softmax(1)
                context = (weights * earlier).sum(1)
            keys.append(self.key(memory[0]))
            return self.write(torch.cat([memory[0], context], -1))

        with writing(self.model, ids.shape[1] - 1, state):
            self.model.base_model(
                input_ids=ids, attention_mask=mask.long(), position_ids=positions(mask, ids.shape[1]), use_cache=False
            )
        return torch.stack(states, 1)


def emulation_loss(states: Tensor, targets: Tensor) -> Tensor:
    """Half the squared distance, summed over layers and width, averaged over rows; both are [B,layers,D]."""
    return 0.5 * (targets - states).square().sum((1, 2)).mean()


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

    def answer_loss(self, task: Task, rows: Sequence[Row], states: Tensor) -> Tensor:
        """The loss of the student's answers to these rows, given states [B,layers,D]."""
        prompts = [row.prompt_ids for row in rows]
        with self.student.reading(states, max(map(len, prompts)) - 1):
            return completion_loss(self.student.model, prompts, [task.direct_ids(row) for row in rows])

    def save_pretrained(self, folder: str | Path, task: Task) -> None:
        """Write two ordinary checkpoints, emulator and student, and next to them the weights that pass the states on."""
        with replaced(folder) as temporary:
            for name, part in ((EMULATOR, self.emulator), (STUDENT, self.student)):
                save_language_model(part.model, task.tokenizer, temporary / name)
            own = {key: x.contiguous() for key, x in self.state_dict().items() if ".model." not in key}
            save_file(own, temporary / STATES, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Pair:
        """Load what ``save_pretrained`` wrote. Raises ValueError if it is missing or incomplete."""
        folder = Path(folder)
        try:
            own = load_file(folder / STATES)
            emulator, student = (load_language_model(folder / name) for name in (EMULATOR, STUDENT))
            pair = cls(Emulator(emulator, len(own["emulator.mixture.weight"])), Student(student))
            missing = [key for key in pair.load_state_dict(own, strict=False).missing_keys if ".model." not in key]
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise ValueError(f"{folder}: could not load the emulator and student: {reason_of(error)}") from error
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
        config: ``explicit_steps`` are the teacher's updates; options about removing tokens have no effect here.

    Returns:
        The pair and the report, which holds what ``internalize.evaluate`` returns on test problems, and "steps", the updates of
        the phase: "full chain" of the teacher, "shown states" of the student with the teacher's states, "emulated states"
        before and "internalized" after the two are trained together. "emulation" is the emulator's mean squared error in each
        layer, of normalised states, so that predicting nothing has error 1.

    Raises:
        ValueError: as ``internalize.internalize``; a model whose layers can't be found.
    """
    # 1. Problems, and three models of the same weights.
    config, kd = config or icot.Config(), kd or Config()
    generator = torch.Generator().manual_seed(config.seed)
    training, test = (task.sample(n, split, generator) for n, split in ((config.rows, "train"), (config.held_out, "test")))
    icot.check_rows(model, task, [*training, *test], config)
    settings = Settings.of(config, kd, recipe="internalize kd", model=name, task=task.name, inputs=hashes(task, model, name))
    teacher = copy.deepcopy(model)
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)  # for the new weights that pass the states on
        pair = Pair(Emulator(copy.deepcopy(model), kd.components), Student(copy.deepcopy(model)))

    # 2. The phases, each followed by what it reaches on test problems.
    phases = Phases(config, kd, training, settings, resume)
    report: dict[str, Any] = {}

    def chain_loss(rows: Sequence[Row]) -> Tensor:
        return completion_loss(teacher, [row.prompt_ids for row in rows], [task.completion_ids(row) for row in rows])

    def shown_states(rows: Sequence[Row]) -> Tensor:
        return teacher_states(teacher, task, rows)

    def emulated_states(rows: Sequence[Row]) -> Tensor:
        return pair.emulator([row.prompt_ids for row in rows])

    def measured(row: str, steps: int, figures: dict[str, Any]) -> None:
        report[row] = {"steps": steps, **figures}
        log_figures(f"{config.out}, {row}", figures)

    phases.train(TEACHER, teacher, config.explicit_steps, chain_loss)
    save_model(Path(config.out) / TEACHER / MODEL, teacher, task, {})
    measured("full chain", config.explicit_steps, icot.evaluate(teacher, task, test, 0, config))
    phases.train(STUDENT, pair.student, kd.student_steps, lambda rows: pair.answer_loss(task, rows, shown_states(rows)))
    shown = shown_states(test)
    measured("shown states", kd.student_steps, evaluate(pair, task, test, shown))
    phases.train(
        EMULATOR, pair.emulator, kd.emulator_steps, lambda rows: emulation_loss(emulated_states(rows), shown_states(rows))
    )
    measured("emulated states", kd.emulator_steps, evaluate(pair, task, test))
    with torch.no_grad():
        report["emulation"] = (emulated_states(test) - shown).square().mean((0, 2)).tolist()
    phases.train(COUPLED, pair, kd.coupled_steps, lambda rows: pair.answer_loss(task, rows, emulated_states(rows)))
    measured("internalized", kd.coupled_steps, evaluate(pair, task, test))
    # 3. What is left at the end.
    pair.save_pretrained(Path(config.out) / PAIR, task)
    write_json(Path(config.out) / f"{NAME}.json", report)
    plot(Path(config.out) / f"{NAME}.png", report, task.name)
    return pair, report


@dataclass
class Phases:
    """The phases of a run, each of which trains one of the models, or the pair, in place."""

    config: icot.Config
    kd: Config
    training: Sequence[Row]
    settings: Settings
    resume: bool

    def train(self, name: str, module: nn.Module, steps: int, loss: Callable[[Sequence[Row]], Tensor]) -> None:
        """Train ``module`` in a folder of this name, without dropout, as the published code does."""
        config, seed = self.config, mix_seed(self.config.seed, NAMES.index(name))
        progress = Progress(Path(config.out) / name, self.settings, {"step": 0}, self.resume)
        rate = config.learning_rate * (self.kd.coupled_rate if name == COUPLED else 1)
        optimizer = adamw(module.eval(), rate, config.weight_decay)
        progress.load(module, optimizer)

        def gradient(step: int) -> dict[str, Any]:
            value = loss([self.training[i] for i in texts_of_step(len(self.training), config.batch_size, seed, step)])
            value.backward()
            return {"loss": float(value.detach())}

        options: dict[str, Any] = {"name": "internalize", "clip": config.clip, "save_every": config.save_every}
        train(module, optimizer, steps, gradient, progress=progress, **options)


@torch.no_grad()
def teacher_states(teacher: PreTrainedModel, task: Task, rows: Sequence[Row]) -> Tensor:
    """[B,layers,D], along the diagonal from the prompt's last token to the separator after the chain."""
    ids, mask = (x.to(teacher.device) for x in padded([row.prompt_ids + task.completion_ids(row) for row in rows]))
    first = torch.tensor([len(row.prompt_ids) - 1 for row in rows], device=ids.device)
    chain = torch.tensor([len(row.cot_ids) + len(task.separator_ids) for row in rows], device=ids.device)
    with dropout_off(teacher):
        out = teacher(ids, attention_mask=mask.long(), output_hidden_states=True, use_cache=False)
    return diagonal(out.hidden_states, first, first + chain)


def evaluate(pair: Pair, task: Task, rows: Sequence[Row], states: Tensor | None = None) -> dict[str, Any]:
    """As ``internalize.evaluate``: answers from the prompt with the emulator's states, or with given ones [B,layers,D]."""
    most = max(len(task.direct_ids(row)) for row in rows) + icot.EXTRA_TOKENS
    began = time.perf_counter()
    written = pair.answer(task, [row.prompt_ids for row in rows], most, states)
    return icot.figures(task, rows, written, time.perf_counter() - began)


def plot(path: Path, report: Mapping[str, Any], title: str) -> None:
    """Plot a run's report."""
    measured = {name: x for name, x in report.items() if name != "emulation"}
    drawn = [
        Panel("layer", "squared error of the normalised state", {"emulator": [list(enumerate(report["emulation"]))]}),
        Panel("accuracy on test problems", "", bars={name: [x["accuracy"]] for name, x in measured.items()}),
        Panel("problems per second", "", bars={name: [x["problems_per_second"]] for name, x in measured.items()}),
    ]
    panels(path, title, drawn)
