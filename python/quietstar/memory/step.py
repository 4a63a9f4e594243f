"""The memory that a training step needs, part by part, from only a model's config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from quietstar.config import ThoughtConfig
from quietstar.hf.architectures import check_architecture
from quietstar.hf.attention import WRAPPED_NAME, hand_on_layout
from quietstar.hf.decoder import PackedPass, decode_rows
from quietstar.hf.fused_layers import fuse_layers
from quietstar.hf.modules import embeddings
from quietstar_kernels import DeltaRows, ThoughtLayout, text_states
from quietstar_kernels.linear_logprob import GPU_PART, default_keep_bytes

# Extra copies of a text position's keys and values when anchors run in chunks: the chunk's own, and the summed gradients.
CHUNK_COPIES = 4
# Logits that a head computes at a time on a CPU (the reference keeps all): so many, or those of ``HEAD_ROWS`` rows if they are
# at most ``HEAD_MOST``; and how many such buffers exist at once.
HEAD_CHUNK, HEAD_ROWS, HEAD_MOST, HEAD_BUFFERS = 2**22, 256, 2**24, 3
# On a GPU: logits at a time, and for how many ids a backward holds the gradients of the logits of all rows.
GPU_LOGITS, GPU_COLUMNS = 2**24, 8192
# Activations with peft's adapters in all linear layers by those without, in bf16, measured with two models on a CPU.
ADAPTERS = 1.7
# The memory of a GPU where there is none.
GPU_BYTES = 80 * 2**30


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step on one device. The rollout's are freed before the activations are allocated.

    Attributes:
        moments: AdamW's two averages.
        text, thoughts: activations of text and thought rows that the decoder keeps for the backward.
        checkpointed: those of text and thoughts with gradient checkpointing: the input of every layer, and one whole layer.
        mixing: the mixing head, the mixed states and the inputs of the LM head.
        head_on_cpu: the logits that the LM head keeps, a chunk of logits, and the head's gradient while it is accumulated.
        head_on_gpu: the same on a GPU, where the head may keep more, and its backward takes more with more rows.
        rollout: keys and values of the text and of T rows of each thought, states, and weights gathered for them alone.
        largest: the largest trained weight.
        gpu_bytes: the memory of the GPU.
    """

    weights: int
    gradients: int
    moments: int
    text: int
    thoughts: int
    checkpointed: int
    mixing: int
    head_on_cpu: int
    head_on_gpu: int
    rollout: int
    largest: int
    gpu_bytes: int

    @property
    def update_on_gpu(self) -> int:
        """AdamW's temporaries where it updates all weights together: denominators (torch.optim.adam._multi_tensor_adam)."""
        return self.moments // 2

    @property
    def update_on_cpu(self) -> int:
        """Those where it updates one weight after the other: a root and a denominator (_single_tensor_adam)."""
        return 2 * self.largest

    def peak(self, checkpointing: bool = False) -> int:
        """Of a GPU, where the update reuses the memory of the activations."""
        return self._kept() + max(self._pass(checkpointing, self.head_on_gpu), self.update_on_gpu)

    def peak_on_cpu(self, libraries: int, checkpointing: bool = False) -> int:
        """Resident memory of a process on a CPU.

        glibc returns freed blocks to the system only above 32 MiB, so what the activations took stays with the process, and the
        update's temporaries come on top. Writing a checkpoint takes nothing more: safetensors writes from the tensors' memory.

        Args:
            libraries: resident memory of the interpreter with its libraries.
        """
        return libraries + self._kept() + self._pass(checkpointing, self.head_on_cpu) + self.update_on_cpu

    def _kept(self) -> int:
        return self.weights + self.gradients + self.moments

    def _pass(self, checkpointing: bool, head: int) -> int:
        kept = self.checkpointed if checkpointing else self.text + self.thoughts
        return max(self.rollout, kept + self.mixing + head)


def thinking_places(thoughts: ThoughtConfig, length: int) -> int:
    """Positions of a text that think, as far as the config says: where they depend on the text, all that might."""
    if thoughts.anchors == "all" or (thoughts.anchors == "sentences" and not thoughts.anchor_count):
        return length
    if thoughts.anchors == "every":
        return -(-length // thoughts.anchor_stride)
    return min(length, thoughts.anchor_count or math.ceil(thoughts.anchor_share * length))


def head_calls(thoughts: ThoughtConfig, B: int, L: int, P: int, in_chunks: bool) -> list[int]:
    """Rows of each call of the LM head whose backward is still to come: B texts of L tokens, P anchors of each at a time."""
    predictions = B * P * thoughts.thoughts * thoughts.lookahead
    calls = [B * L, B * P * thoughts.lookahead + predictions] if in_chunks else [B * L + predictions]
    calls += [predictions] * (thoughts.mixing == "logprobs")  # mixed after the head, so that it sees both states
    return [*calls, B * P * thoughts.thoughts * thoughts.thought_tokens]


def head_on_cpu(calls: Sequence[int], V: int, D: int, dtype: torch.dtype, gradient: int | None = None) -> int:
    """Bytes that calls of a head [V,D] take on a CPU, where all logits are fp32; ``gradient``: of those, its weight's."""
    chunk = min(max(HEAD_CHUNK, HEAD_ROWS * V), HEAD_MOST, V * max(calls))
    kept = _head_kept(calls, 4 * V, default_keep_bytes(torch.device("cpu")))
    return 4 * HEAD_BUFFERS * chunk + kept + (_head_gradient(V, D, dtype) if gradient is None else gradient)


def head_on_gpu(calls: Sequence[int], V: int, D: int, dtype: torch.dtype, gpu_bytes: int, gradient: int | None = None) -> int:
    """Bytes that calls of a head [V,D] take on a GPU with ``gpu_bytes`` of memory; ``gradient`` as above."""
    kept = _head_kept(calls, dtype.itemsize * V, gpu_bytes // GPU_PART)
    return head_backward(max(calls), V, D, dtype) + kept + (_head_gradient(V, D, dtype) if gradient is None else gradient)


def head_backward(R: int, V: int, D: int, dtype: torch.dtype) -> int:
    """Bytes that the backward of R rows takes on a GPU, with the gradient of the states and without that of the weight."""
    logits = 4 * min(GPU_LOGITS, R * V)
    gradients = dtype.itemsize * min(max(GPU_LOGITS, GPU_COLUMNS * R), R * V)
    return logits + gradients + R * D * (4 + dtype.itemsize * (dtype.itemsize < 4))  # a sum in fp32, and its 16 bits


def _head_kept(calls: Sequence[int], row: int, most: int) -> int:
    return sum(row * R for R in calls if row * R <= most)


def _head_gradient(V: int, D: int, dtype: torch.dtype) -> int:
    return 4 * V * D * (1 + (dtype.itemsize < 4))


def step_memory(
    config: PretrainedConfig,
    thoughts: ThoughtConfig,
    batch_size: int,
    length: int,
    dtype: torch.dtype = torch.float32,
    anchor_chunk: int | None = None,
    gpu_bytes: int | None = None,
    places: int | None = None,
    adapters: bool = False,
) -> StepMemory:
    """An estimate for ``batch_size`` texts of ``length`` tokens.

    No weights are loaded and nothing is allocated: the decoder runs on tensors without storage, and the sizes of what autograd
    would keep are added up.

    Args:
        anchor_chunk: anchors of each text at a time. The thoughts of a chunk are recomputed as a whole, not layer by layer.
        gpu_bytes: the memory of the GPU, on which it depends what the LM head keeps. Default that of the GPU here, or 80 GiB.
        places: positions of a text that think. Default all.
        adapters: whether only they are trained, and the LM head has no gradient.

    Raises:
        ValueError: the model type can't think, or needs the values of tensors.
    """
    check_architecture(config)
    text_config = config.get_text_config()
    B, L, N, T, J = batch_size, length, thoughts.thoughts, thoughts.thought_tokens, thoughts.lookahead
    places = L if places is None else max(1, min(places, L))
    rows = L + places * N * thoughts.rows
    # Experts run without storage only in bf16.
    faked = torch.bfloat16 if getattr(text_config, "num_experts_per_tok", None) else dtype
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=faked)
        model.set_attn_implementation(WRAPPED_NAME)
        hand_on_layout(model)
        fuse_layers(model)
        sizes = [x.numel() for x in model.parameters()]
        anchors = torch.arange(places).expand(B, -1)
        layout = ThoughtLayout.at(anchors, N, thoughts.rows, L)
        try:
            kept, keys_values, states = _decoder(model, layout)
        except RuntimeError as error:  # some experts read values
            what = f"the memory of a step can't be estimated for model type {config.model_type!r}"
            raise ValueError(f"{what}: {error}") from error
        V, D = model.get_output_embeddings().weight.shape
    kept, keys_values, states = (x * dtype.itemsize // faked.itemsize for x in (kept, keys_values, states))

    P = places if anchor_chunk is None else min(anchor_chunk, places)  # of one chunk
    layers, half = text_config.num_hidden_layers, dtype.itemsize < 4
    weights = sum(sizes) * dtype.itemsize + 4 * (3 * D * D + 5 * D)  # the mixing head and both vectors are fp32
    predictions = B * P * N * J
    # In fp32: text and thought states side by side, two hidden layers, the text states, and a cast copy of the thought states.
    mixing = 4 * D * ((4 * predictions + B * P * J) * (thoughts.mixing != "none") + half * predictions)
    head_inputs = dtype.itemsize * D * (B * (L - 1) + predictions + B * P * N * T)
    calls = head_calls(thoughts, B, L, P, anchor_chunk is not None)
    if gpu_bytes is None:
        gpu_bytes = torch.cuda.get_device_properties().total_memory if torch.cuda.is_available() else GPU_BYTES
    text_kept, thoughts_kept = kept * L // rows, (kept - kept * L // rows) * P // places
    if adapters:
        text_kept, thoughts_kept = int(ADAPTERS * text_kept), int(ADAPTERS * thoughts_kept)
    layer_inputs = layers * B * D * dtype.itemsize  # for a row
    checkpointed = layer_inputs * rows + kept // layers
    if anchor_chunk is not None:
        text_kept += CHUNK_COPIES * B * L * keys_values
        checkpointed = layer_inputs * L + CHUNK_COPIES * B * L * keys_values + thoughts_kept
    head = 0 if adapters else _head_gradient(V, D, dtype)
    return StepMemory(
        weights=weights,
        gradients=weights,
        moments=2 * weights,
        text=text_kept,
        thoughts=thoughts_kept,
        checkpointed=checkpointed,
        mixing=mixing + head_inputs,
        head_on_cpu=head_on_cpu(calls, V, D, dtype, head),
        head_on_gpu=head_on_gpu(calls, V, D, dtype, gpu_bytes, head),
        rollout=B * ((L + P * N * T) * keys_values + states),
        largest=max(max(sizes) * dtype.itemsize, 4 * 2 * D * D),
        gpu_bytes=gpu_bytes,
    )


class _KeepNothing(torch.autograd.Function):
    """An attention call without storage. It keeps what the real one keeps: queries, keys, values, output and row sums."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out


class _SizesOnly(PackedPass):
    """Counts the bytes of what a row leaves for later ones, over all calls, and of a text's states in recurrent layers."""

    keys_values = states = 0

    def keep(self, *rows: Tensor, width: int | None = None) -> None:
        self.keys_values += sum(x[0, :, 0].numel() * x.element_size() for x in rows)
        if len(rows) == len(DeltaRows._fields):
            found = text_states(DeltaRows(*(x[:1, :, : self.layout.L] for x in rows)), self.layout.lo[:1])
            self.states += found.numel() * found.element_size()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.keep(k, v)
        self.calls += 1
        return _KeepNothing.apply(q, k, v)


def _decoder(model: PreTrainedModel, layout: ThoughtLayout) -> tuple[int, int, int]:
    """Bytes that autograd keeps in a forward over a layout, of what a row leaves for later ones, and of a text's states."""
    weights = {x.untyped_storage()._cdata for x in [*model.parameters(), *model.buffers()]}
    kept = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # a reference, so that its address is not reused
        return x

    sizes = _SizesOnly(layout)
    ids = torch.zeros(layout.B, layout.M, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        decode_rows(model.train(), embeddings(model)(ids), ids, sizes)
    return sum(storage.nbytes() for storage in kept.values()), sizes.keys_values, sizes.states


def memory_table(memory: StepMemory, libraries: int, checkpointing: bool = False) -> str:
    """A row for each part, and the sums."""
    rows = {"weights": memory.weights, "gradients": memory.gradients, "optimizer moments": memory.moments}
    if checkpointing:
        rows["activations that are not recomputed"] = memory.checkpointed
    else:
        rows |= {"activations of the text": memory.text, "activations of the thoughts": memory.thoughts}
    rows |= {
        "mixing head": memory.mixing,
        "rollout (before)": memory.rollout,
        f"LM head on a GPU that has {human(memory.gpu_bytes)}": memory.head_on_gpu,
        "AdamW's temporaries on a GPU (after)": memory.update_on_gpu,
        "together, on a GPU": memory.peak(checkpointing),
        "LM head on a CPU": memory.head_on_cpu,
        "AdamW's temporaries on a CPU": memory.update_on_cpu,
        "Python and libraries": libraries,
        "together, a process on a CPU": memory.peak_on_cpu(libraries, checkpointing),
    }
    return "\n".join(f"  {name:<42}{human(size):>10}" for name, size in rows.items())


def human(size: float) -> str:
    """Bytes in the unit that leaves at most four digits before the decimal point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"
