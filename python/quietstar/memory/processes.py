"""The memory that one of W processes needs for its share of a step, and what it sends, from only a model's config.

Sources: ZeRO (arXiv 1910.02054, sections 5 and 7) for what is sharded; PyTorch FSDP (arXiv 2304.11277, sections 3 and 4) for
what is gathered at a time; Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms (2009), for rings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from quietstar.config import AdapterConfig, ThoughtConfig
from quietstar.memory.step import StepMemory, human


@dataclass(frozen=True)
class Weights:
    """The number of weights in each group that ``run.sharding.shard`` makes."""

    layers: int  # all decoder layers, with their adapters
    layer: int  # the largest layer
    head: int  # the mixing head, fp32
    rest: int  # embeddings, LM head, final norm and both thought vectors
    trained: int  # all weights with gradients
    own: int  # the language model's weights, which have its dtype; thought parts and adapters are fp32
    largest: int  # the largest trained weight of the language model, 0 with adapters
    largest_added: int  # that of the thought parts, the mixing head's first; adapters are smaller

    def bytes(self, dtype: torch.dtype) -> int:
        return dtype.itemsize * self.own + 4 * (self.layers + self.head + self.rest - self.own)

    def gradient_bytes(self, dtype: torch.dtype) -> int:
        added = self.layers + self.head + self.rest - self.own
        return dtype.itemsize * max(0, self.trained - added) + 4 * added


def count_weights(config: PretrainedConfig, adapters: AdapterConfig | None = None, mixing: bool = True) -> Weights:
    """The weights of a model with its thought parts, and with ``adapters`` unless their rank is 0.

    Args:
        mixing: whether the thought parts are trained; they aren't where the thought alone predicts.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    adapters = adapters or AdapterConfig()
    names = set(model._no_split_modules or [])
    layers = [module for module in model.modules() if type(module).__name__ in names]
    own = [_size(layer) for layer in layers]
    added = [_adapter_size(layer, adapters) for layer in layers]
    total, D = _size(model), model.get_output_embeddings().in_features
    head = 3 * D * D + 3 * D
    trained = sum(added) if adapters.lora_rank else total
    together = [a + b for a, b in zip(own, added, strict=True)]
    return Weights(
        layers=sum(together),
        layer=max(together, default=0),
        head=head,
        rest=total - sum(own) + 2 * D,
        trained=trained + (head + 2 * D) * mixing,
        own=total,
        largest=0 if adapters.lora_rank else max(x.numel() for x in model.parameters()),
        largest_added=2 * D * D,
    )


def _size(module: nn.Module) -> int:
    return sum(x.numel() for x in module.parameters())


def _adapter_size(layer: nn.Module, adapters: AdapterConfig) -> int:
    """LoRA's two matrices, r x in and out x r, for each targeted linear layer (arXiv 2106.09685, section 4.1)."""
    targets = [name.strip() for name in adapters.lora_targets.split(",")]
    chosen = [
        linear
        for name, linear in layer.named_modules()
        if isinstance(linear, nn.Linear) and (targets == ["all-linear"] or name.rsplit(".", 1)[-1] in targets)
    ]
    return adapters.lora_rank * sum(linear.in_features + linear.out_features for linear in chosen)


def base_copy(weights: Weights, thoughts: ThoughtConfig, dtype: torch.dtype, adapters: bool) -> int:
    """Bytes of the copy that rewards are compared with: of the adapters where only they are trained."""
    if thoughts.base_model == "ema":
        return 4 * (weights.layers + weights.rest - weights.own if adapters else weights.own)
    return dtype.itemsize * weights.own * (thoughts.base_model == "frozen" and not adapters)


@dataclass(frozen=True)
class Processes:
    """How a step is distributed.

    Attributes:
        number: W.
        sharding: no (DDP), full_shard or shard_grad_op.
        dtype: of the language model's weights, gradients and moments.
        computed: the dtype that weights are gathered in or cast to for computation.
        gathered: whether all layers are gathered at once for the rollout, which full_shard else does one by one.
    """

    number: int
    sharding: str = "no"
    dtype: torch.dtype = torch.float32
    computed: torch.dtype = torch.float32
    gathered: bool = False


def process_memory(memory: StepMemory, weights: Weights, processes: Processes) -> StepMemory:
    """``memory``, the estimate for one process's texts, with this process's share of weights, gradients and moments.

    Sharded weights are gathered for one layer while the next is fetched (full_shard), or for all layers (shard_grad_op, and
    ``gathered`` during the rollout).
    Gradients are whole for one layer, and for the last group until the end of the backward.
    """
    W, computed = processes.number, processes.computed.itemsize
    largest = max(processes.dtype.itemsize * weights.largest, 4 * weights.largest_added)
    kept, gradients = weights.bytes(processes.dtype), weights.gradient_bytes(processes.dtype)
    if processes.sharding == "no":
        copies = computed * weights.layers if computed < processes.dtype.itemsize else 0  # autocast casts each weight once
        return replace(memory, weights=kept + copies, gradients=gradients, moments=2 * gradients, largest=largest)
    whole = weights.rest + (2 * weights.layer if processes.sharding == "full_shard" else weights.layers)
    # The last group's gradients wait for the end; a layer's are being summed in the dtype of the weights.
    unsummed = computed * (weights.rest + weights.layer) + processes.dtype.itemsize * weights.layer
    trained = (gradients - 4 * weights.head) / (kept - 4 * weights.head)
    return replace(
        memory,
        weights=kept // W + computed * whole + 4 * weights.head,
        gradients=gradients // W + int(trained * unsummed),
        moments=2 * gradients // W,
        rollout=memory.rollout + processes.gathered * computed * max(0, weights.layers - 2 * weights.layer),
        largest=largest // W,
    )


@dataclass(frozen=True)
class StepTraffic:
    """Bytes of the whole tensors that a step gathers or sums over the processes, for one part of its texts."""

    all_gather: int = 0  # weights, counted each time they are gathered
    reduce_scatter: int = 0  # gradients that are summed and sharded
    all_reduce: int = 0  # gradients that are summed for every process

    def sent(self, W: int) -> int:
        """Bytes that each of W processes in a ring sends, and receives: (W-1)/W of what is gathered or scattered, and twice
        that for an all-reduce, which does both.
        """
        return int((self.all_gather + self.reduce_scatter + 2 * self.all_reduce) * (W - 1) / W)


def step_traffic(weights: Weights, thoughts: ThoughtConfig, processes: Processes, chunks: int = 1) -> StepTraffic:
    """What a step communicates with ``chunks`` chunks of anchors; 1 means no chunks.

    full_shard gathers a layer for every pass through it: the rollout's text and T rows of each chunk, the forward of the text
    and of each chunk, the recomputation of each chunk, and the backward. shard_grad_op gathers it for the first pass and keeps
    it until its backward; a backward in chunks gathers it for each chunk. Where the rollout's weights are gathered, it is done
    once, with those of the heads.
    """
    if processes.sharding == "no":
        return StepTraffic(all_reduce=weights.gradient_bytes(processes.dtype))
    n, T = chunks, thoughts.thought_tokens
    rollout, training = 1 + (not processes.gathered) * n * T, 2 if n == 1 else 2 + 3 * n
    heads = 2 if n == 1 else 2 * n
    if processes.sharding == "shard_grad_op":
        rollout, training, heads = 0, 1 if n == 1 else 1 + n, n
    heads += processes.gathered
    layers = (rollout + training) * weights.layers
    return StepTraffic(
        all_gather=processes.computed.itemsize * (layers + weights.rest) + 4 * heads * weights.head,
        reduce_scatter=weights.gradient_bytes(processes.dtype),
    )


def gathered_dtype(dtype: torch.dtype, precision: str) -> torch.dtype:
    """The dtype that the model computes in: that of the mixed precision ``bf16`` or ``fp16``, or for ``no`` the weights'."""
    return {"no": dtype, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def traffic_table(traffic: StepTraffic, processes: Processes) -> str:
    """What each process sends in a step, as a table to print."""
    rows = {
        "weights gathered": traffic.all_gather,
        "gradients summed and sharded": traffic.reduce_scatter,
        "gradients summed for all": traffic.all_reduce,
        f"sent by each of {processes.number}, in a ring": traffic.sent(processes.number),
    }
    return "\n".join(f"  {name:<42}{human(size):>10}" for name, size in rows.items() if size)


def chunk_count(length: int, anchor_chunk: int | None) -> int:
    """Chunks of a text that thinks at every position."""
    return 1 if anchor_chunk is None else math.ceil(length / anchor_chunk)
