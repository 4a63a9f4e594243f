"""A step of group RL in TRL's GRPOTrainer: each prompt packed once with its completions, against one copy for each completion.

"loss and backward" is the forward of the loss and its backward, of completions that were sampled before; their lengths are
random, from half of T to T. "whole step" is TRL's training step, which generates completions of T tokens first. Memory is that
of a step, without weights. The grid "checkpointing" recomputes layers in the backward, which is TRL's default. In "turns", half
of the completions have their first tokens in common, such as a first turn and the answer of a tool.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.baselines.llama import QWEN3_600M, SMOLLM2_135M, LlamaCase, random_llama
from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.candidate import PACKAGE, Candidate, not_installed
from benchmarks.harness.case import Inputs, Work, judge

SEED = 1
# For a whole model, since rounding accumulates over the layers.
STEP_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.1}
WHOLE_STEP = "whole step"
CHECKPOINTING = "activation_checkpointing", "gradient_checkpointing"  # its name in newer versions of transformers, and in 5.17


@dataclass(frozen=True, kw_only=True)
class GroupCase(LlamaCase):
    """C completions each of B prompts, with a Llama.

    Attributes:
        L: tokens of a prompt.
        T: tokens of the longest completion.
        turn: tokens, at most T/2, that half of a prompt's completions begin with.
        checkpointing: whether to use gradient checkpointing.
    """

    op: ClassVar[str] = "group_rl"
    size_names = ("B", "L", "C", "T", "layers", "D", "H", "G", "V")
    what: str = "loss and backward"
    B: int = 1
    L: int = 512
    C: int = 8
    T: int = 128
    turn: int = 0
    V: int = 4096
    checkpointing: bool = False

    def lengths(self) -> Tensor:
        """int64 [B*C], tokens of the completions."""
        shortest = self.T if self.what == WHOLE_STEP else self.T // 2
        return torch.randint(shortest, self.T + 1, (self.B * self.C,), generator=torch.Generator().manual_seed(SEED))

    def work(self) -> Work:
        """Matmuls of the packed forward and the backward, of the second forward of checkpointed layers, and of generation."""
        own = self.lengths()
        saved = self.B * (self.C // 2 - 1) * self.turn
        rows = self.B * self.L + int(own.sum()) - len(own) - saved
        seen = self.B * self.L * (self.L + 1) / 2 + int((own * self.L + own * (own + 1) / 2).sum())
        seen -= saved * (self.L + (self.turn + 1) / 2)
        layers = 2 * rows * self.matrices + self.mixing(rows, seen)
        head, generated = 2 * (int(own.sum()) - saved) * self.D * self.V, self.what == WHOLE_STEP
        return Work((3 + self.checkpointing + generated) * layers + (3 + generated) * head)

    def mixing(self, rows: float, pairs: float) -> float:
        """FLOPs by which all layers mix positions: attention, of so many pairs of a row and one it sees."""
        return self.layers * 4 * self.K * self.H * pairs

    def inputs(self, seed: int) -> Inputs:
        """What TRL gives the loss: prompts repeated C times, completions padded on the right."""
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randint(2, self.V, (self.B, self.L), generator=generator).repeat_interleave(self.C, 0)
        shown = (torch.arange(self.T) < self.lengths()[:, None]).long()
        completions = torch.randint(2, self.V, shown.shape, generator=generator) * shown
        groups = completions.view(self.B, self.C, self.T)
        groups[:, : self.C // 2, : self.turn] = groups[:, :1, : self.turn]
        inputs = {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts),
            "completion_ids": completions,
            "completion_mask": shown,
            "advantages": torch.randn(len(shown), generator=generator),
            "num_items_in_batch": shown.sum(),
        }
        return {name: x.to(self.device) for name, x in inputs.items()}

    def call(self, function: Step, inputs: Inputs) -> Tensor:
        return function(inputs)

    def check(self, function: Step) -> None:
        """Compare loss and gradients with those of TRL's own trainer in fp32."""
        small = replace(self, L=min(self.L, 40), T=min(self.T, 12), B=min(self.B, 2), C=min(self.C, 4), turn=min(self.turn, 6))
        inputs, truth = small.inputs(seed=0), prepare(stock)(replace(self, dtype=torch.float32))
        truth.trainer.model.load_state_dict(function.trainer.model.state_dict())
        judge("loss", function.loss(inputs), truth.loss(inputs), STEP_BOUNDS[self.dtype])
        pairs = zip(function.trainer.model.parameters(), truth.trainer.model.parameters(), strict=True)
        grads = zip(*((mine.grad.float().flatten(), exact.grad.flatten()) for mine, exact in pairs), strict=True)
        judge("gradient", *map(torch.cat, grads), STEP_BOUNDS[self.dtype])

    def model(self) -> PreTrainedModel:
        return random_llama(self, SEED, max_position_embeddings=self.L + self.T, pad_token_id=0, eos_token_id=1)


class Step:
    """Loss and gradients of a batch; of a whole step, from prompts on."""

    def __init__(self, trainer_class: type, case: GroupCase):
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
        from trl import GRPOConfig

        self.folder = tempfile.TemporaryDirectory()
        words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1} | {str(i): i for i in range(2, case.V)}, "<pad>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fields = GRPOConfig.__dataclass_fields__
        config = GRPOConfig(
            self.folder.name,
            per_device_train_batch_size=case.B * case.C,
            num_generations=case.C,
            max_completion_length=case.T,
            report_to="none",
            use_cpu=case.device.type == "cpu",
            bf16=False,
            **{next(name for name in CHECKPOINTING if name in fields): case.checkpointing},
        )
        self.trainer = trainer_class(
            case.model(),
            lambda completions, **_: [float(hash(completion) % 2) for completion in completions],
            config,
            Dataset.from_list([{"prompt": "<end>"}] * case.B),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>"),
        )
        self.trainer.current_gradient_accumulation_steps = 1  # as ``train`` does, and what follows
        if case.checkpointing:
            model = self.trainer.model
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        self.trainer.model.train()
        self.whole = case.what == WHOLE_STEP

    def __call__(self, inputs: Inputs) -> Tensor:
        if not self.whole:
            return self.loss(inputs)
        torch.manual_seed(SEED)  # the same completions for both
        self.trainer.model.zero_grad()
        prompts = [{"prompt": " ".join(map(str, ids))} for ids in inputs["prompt_ids"].tolist()]
        return self.trainer.training_step(self.trainer.model, prompts, None)

    def loss(self, inputs: Inputs) -> Tensor:
        self.trainer.model.zero_grad()
        loss = self.trainer.compute_loss(self.trainer.model, inputs)
        loss.backward()
        return loss.detach()


def stock() -> type:
    from trl import GRPOTrainer

    return GRPOTrainer


def shared() -> type:
    from quietstar import SharedPrompts

    return type("SharedPromptTrainer", (SharedPrompts, stock()), {})


def prepare(trainer_class: Callable[[], type]) -> Callable[[GroupCase], Step]:
    return lambda case: Step(trainer_class(), case)


def no_trl(case: GroupCase) -> str | None:
    return not_installed("trl") or not_installed("datasets")


OURS = Candidate("SharedPrompts", prepare(shared), PACKAGE, no_trl)
STOCK = Candidate("TRL, repeated prompts", prepare(stock), "trl", no_trl)


def cases(device: torch.device, full: bool) -> Iterator[GroupCase]:
    """The grid, the most important cases first."""
    if device.type == "cuda":
        headline = GroupCase(L=2048, T=256, device=device, dtype=torch.bfloat16, **QWEN3_600M)
        yield headline
        for shape in (SMOLLM2_135M, QWEN3_600M):
            yield replace(headline, grid="end to end", what=WHOLE_STEP, T=64, **({"width": 0} | shape))
    else:
        headline = GroupCase(device=device)
        yield headline
    yield replace(headline, grid="checkpointing", checkpointing=True)
    if full:
        yield replace(headline, grid="generation", what=WHOLE_STEP, T=128)
        yield replace(headline, grid="prompts", B=4, L=headline.L // 2, C=4)
        yield replace(headline, grid="completions", L=headline.L // 4, T=2 * headline.T)
        yield replace(headline, grid="turns", T=3 * headline.T, turn=3 * headline.T // 2)


def smoke(device: torch.device) -> list[GroupCase]:
    """The smallest cases that run every candidate."""
    tiny = GroupCase(B=2, L=8, C=2, T=6, layers=1, D=32, I=48, H=2, G=1, V=80, device=device)
    others = (replace(tiny, grid="generation", what=WHOLE_STEP), replace(tiny, grid="turns", C=4, turn=3))
    return [tiny, *others]


BENCHMARK = Benchmark(GroupCase.op, OURS, lambda case: [STOCK], cases, smoke)
