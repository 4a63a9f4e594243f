"""One of W processes: the memory that its share of a step needs, and what it sends, from a model's config alone.

Sources: ZeRO (arXiv 1910.02054, sections 5 and 7) for what is cut over processes; PyTorch FSDP (arXiv 2304.11277, sections 3
and 4) for what is whole at a time; Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms (2009), for a ring.
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
    """How many weights there are, by the groups that ``sharding.shard`` makes of them.

    Attributes:
        layers: the decoder's layers together, with their adapters.
        layer: the largest one.
        head: the mixing head, fp32.
        rest: embeddings, LM head, final norm and both thought vectors.
        trained: of all of these, those that have gradients.
        own: the language model's, which have its dtype; thought parts and adapters are fp32.
    """

    layers: int
    layer: int
    head: int
    rest: int
    trained: int
    own: int

    def bytes(self, dtype: torch.dtype) -> int:
        return dtype.itemsize * self.own + 4 * (self.layers + self.head + self.rest - self.own)

    def gradient_bytes(self, dtype: torch.dtype) -> int:
        added = self.layers + self.head + self.rest - self.own
        return dtype.itemsize * max(0, self.trained - added) + 4 * added


def count_weights(config: PretrainedConfig, adapters: AdapterConfig | None = None) -> Weights:
    """Those of a model with its thought parts. ``adapters`` of rank 0 are none."""
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
        trained=trained + head + 2 * D,
        own=total,
    )


def _size(module: nn.Module) -> int:
    return sum(x.numel() for x in module.parameters())


def _adapter_size(layer: nn.Module, adapters: AdapterConfig) -> int:
    """LoRA's two matrices, r x in and out x r, beside each linear map that is a target (arXiv 2106.09685, section 4.1)."""
    targets = [name.strip() for name in adapters.lora_targets.split(",")]
    chosen = [
        linear
        for name, linear in layer.named_modules()
        if isinstance(linear, nn.Linear) and (targets == ["all-linear"] or name.rsplit(".", 1)[-1] in targets)
    ]
    return adapters.lora_rank * sum(linear.in_features + linear.out_features for linear in chosen)


@dataclass(frozen=True)
class Processes:
    """How a step is spread.

    Attributes:
        number: W.
        sharding: no (DDP), full_shard or shard_grad_op.
        dtype: of the language model's weights, gradients and moments.
        computed: dtype that weights are gathered or cast to where the model runs.
    """

    number: int
    sharding: str = "no"
    dtype: torch.dtype = torch.float32
    computed: torch.dtype = torch.float32


def process_memory(memory: StepMemory, weights: Weights, processes: Processes) -> StepMemory:
    """``memory`` of one process's texts, with the weights, gradients and moments that are in this process.

    Cut weights come together for a layer, or for all of them at once, and another layer is fetched meanwhile; gradients are
    whole for a layer, and for the last group until the backward ends.
    """
    W, computed = processes.number, processes.computed.itemsize
    kept, gradients = weights.bytes(processes.dtype), weights.gradient_bytes(processes.dtype)
    if processes.sharding == "no":
        copies = computed * weights.layers if computed < processes.dtype.itemsize else 0  # autocast casts each weight once
        return replace(memory, weights=kept + copies, gradients=gradients, moments=2 * gradients)
    whole = weights.rest + (2 * weights.layer if processes.sharding == "full_shard" else weights.layers)
    # Those of the last group wait for the end, those of a layer are being summed in the dtype that is kept.
    unsummed = computed * (weights.rest + weights.layer) + processes.dtype.itemsize * weights.layer
    trained = (gradients - 4 * weights.head) / (kept - 4 * weights.head)
    return replace(
        memory,
        weights=kept // W + computed * whole + 4 * weights.head,
        gradients=gradients // W + int(trained * unsummed),
        moments=2 * gradients // W,
    )


@dataclass(frozen=True)
class StepTraffic:
    """Bytes of the whole tensors that a step gathers or sums over the processes, for one part of its texts.

    Attributes:
        all_gather: weights, each time that they come together.
        reduce_scatter: gradients that are summed and cut.
        all_reduce: gradients that are summed for every process.
    """

    all_gather: int = 0
    reduce_scatter: int = 0
    all_reduce: int = 0

    def sent(self, W: int) -> int:
        """Bytes that each of W processes sends, and receives, where they stand in a ring: (W-1)/W of what is gathered or summed
        once, and twice that of an all-reduce, which is both.
        """
        return int((self.all_gather + self.reduce_scatter + 2 * self.all_reduce) * (W - 1) / W)


def step_traffic(weights: Weights, thoughts: ThoughtConfig, processes: Processes, chunks: int = 1) -> StepTraffic:
    """What a step with ``chunks`` chunks of anchors moves; 1 is no chunks.

    full_shard gathers a layer for every pass through it: the rollout's text and T rows of each chunk, the forward of text and
    chunks, each chunk once more to compute it again, and the backward. shard_grad_op gathers it for the first pass and keeps it
    until its backward; a backward that is done in chunks gathers it for each.
    """
    if processes.sharding == "no":
        return StepTraffic(all_reduce=weights.gradient_bytes(processes.dtype))
    n, T = chunks, thoughts.thought_tokens
    rollout, training = 1 + n * T, 2 if n == 1 else 2 + 3 * n
    heads = 2 if n == 1 else 2 * n
    if processes.sharding == "shard_grad_op":
        rollout, training, heads = 0, 1 if n == 1 else 1 + n, n
    layers = (rollout + training) * weights.layers
    return StepTraffic(
        all_gather=processes.computed.itemsize * (layers + weights.rest) + 4 * heads * weights.head,
        reduce_scatter=weights.gradient_bytes(processes.dtype),
    )


def gathered_dtype(dtype: torch.dtype, precision: str) -> torch.dtype:
    """What the model computes in: that of the mixed precision ``no``, ``bf16`` or ``fp16``, or of its weights."""
    return {"no": dtype, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def traffic_table(traffic: StepTraffic, processes: Processes) -> str:
    rows = {
        "weights gathered": traffic.all_gather,
        "gradients summed and cut": traffic.reduce_scatter,
        "gradients summed for all": traffic.all_reduce,
        f"sent by each of {processes.number}, in a ring": traffic.sent(processes.number),
    }
    return "\n".join(f"  {name:<42}{human(size):>10}" for name, size in rows.items() if size)


def chunk_count(length: int, anchor_chunk: int | None) -> int:
    """Of a text whose positions all think."""
    return 1 if anchor_chunk is None else math.ceil(length / anchor_chunk)
