"""``quietstar doctor``"""

from __future__ import annotations

import platform
import textwrap
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, ClassVar, Literal

import psutil
import torch
from tyro.conf import arg

from quietstar.checkpoints.pretrained import load_config, load_model
from quietstar.cli.common import AllowBin, this_machine
from quietstar.cli.errors import UsageError
from quietstar.cli.ignored import Rule
from quietstar.config import AdapterConfig, Dtype, ThoughtConfig
from quietstar.hf.verify import verify
from quietstar.memory.fit import Plan, too_large
from quietstar.memory.processes import (
    Processes,
    chunk_count,
    count_weights,
    gathered_dtype,
    process_memory,
    step_traffic,
    traffic_table,
)
from quietstar.memory.step import StepMemory, human, memory_table, step_memory
from quietstar_kernels import backends, cpu_library, cuda_library
from quietstar_kernels.cpu.products import cpu_products
from quietstar_kernels.linear_logprob import default_keep_bytes

MOST_ROWS = 2**40  # more than any memory holds, and few enough that no product of sizes overflows
OFFICIAL = ThoughtConfig()
PACKAGES = ("quietstar-kernels", "torch", "triton", "transformers", "accelerate", "datasets")


@dataclass
class Doctor:
    """Print versions, devices and back ends; with --model, the memory of training."""

    model: Annotated[str, arg(help="hub name or folder of a model; only its config is read")] = ""
    batch_size: Annotated[int, arg(help="texts at a time: --batch-size of train by accumulation and processes")] = 1
    length: Annotated[int, arg(help="L, tokens of a text")] = 256
    thoughts: Annotated[int, arg(help="N, thoughts sampled at every position")] = OFFICIAL.thoughts
    thought_tokens: Annotated[int, arg(help="T, sampled tokens in a thought")] = OFFICIAL.thought_tokens
    lookahead: Annotated[int, arg(help="J, next tokens predicted after a thought")] = OFFICIAL.lookahead
    lora_rank: Annotated[int, arg(help="rank of LoRA adapters; 0 for none")] = AdapterConfig.lora_rank
    lora_targets: Annotated[str, arg(help="names of the layers that get adapters")] = AdapterConfig.lora_targets
    dtype: Annotated[Dtype, arg(help="dtype of the weights")] = "float32"
    precision: Annotated[Literal["no", "bf16", "fp16"], arg(help="mixed precision")] = "no"
    processes: Annotated[int, arg(help="processes that train together; prints what they exchange")] = 1
    sharding: Annotated[Literal["no", "full_shard", "shard_grad_op"], arg(help="sharding over the processes")] = "no"
    gradient_checkpointing: Annotated[bool, arg(help="activations are recomputed in the backward pass")] = False
    anchor_chunk: Annotated[int | None, arg(help="anchors of each text at a time; default all")] = None
    verify: Annotated[bool, arg(help="also load the weights, and compare thoughts with ordinary forward passes")] = False
    allow_bin: AllowBin = False

    inherits: ClassVar = ("length", "thoughts", "thought_tokens", "lookahead")
    ignored: ClassVar = [
        Rule(
            "batch_size length thoughts thought_tokens lookahead lora_rank lora_targets dtype precision processes sharding "
            "anchor_chunk verify",
            lambda o: not o.model,
            "without --model",
        ),
        Rule("lora_targets", lambda o: not o.lora_rank, "without --lora-rank"),
    ]

    def run(self) -> None:
        print(environment())
        if self.model:
            print(f"\n{self._training()}")
        if self.verify:
            model = load_model(self.model, self.allow_bin, dtype=self.dtype)
            print(f"thoughts against ordinary forward passes: {verify(model)}")

    def _training(self) -> str:
        """Tables of the memory that a step needs in each process, and of what the processes exchange."""
        # Those of ``quietstar train``, which are loaded here too.
        libraries = psutil.Process().memory_info().rss
        config = load_config(self.model)
        if min(self.processes, self.batch_size, self.length, self.anchor_chunk or 1) < 1:
            raise UsageError("--processes, --batch-size, --length and --anchor-chunk must be 1 or more")
        try:
            thoughts = ThoughtConfig(thoughts=self.thoughts, thought_tokens=self.thought_tokens, lookahead=self.lookahead)
            adapters = AdapterConfig(lora_rank=self.lora_rank, lora_targets=self.lora_targets)
        except ValueError as error:
            raise UsageError(str(error)) from error
        rows = self.batch_size * self.length * (1 + thoughts.thoughts * thoughts.rows)
        if rows > MOST_ROWS:
            raise UsageError(f"--batch-size, --length and thoughts make {rows:,} rows, and {MOST_ROWS:,} are the most")
        dtype = getattr(torch, self.dtype)
        processes = Processes(self.processes, self.sharding, dtype, gathered_dtype(dtype, self.precision))
        weights = count_weights(config, adapters)

        @cache
        def estimate(texts: int, anchor_chunk: int | None) -> StepMemory:
            memory = step_memory(config, thoughts, texts, self.length, processes.computed, anchor_chunk)
            return process_memory(memory, weights, processes)

        memory = estimate(self.batch_size, self.anchor_chunk)
        size = f"{self.batch_size} x {self.length} tokens, {rows:,} rows with thoughts"
        table = memory_table(memory, libraries, self.gradient_checkpointing)
        machine = this_machine(self.processes)
        plan = Plan(self.batch_size, self.gradient_checkpointing, self.anchor_chunk)
        reason = too_large(plan, self.length, estimate, machine, "--batch-size={}".format)
        fits = f"doesn't fit: {reason}" if reason else f"fits in the {human(machine.free)} that are free"
        text = f"{self.model}: a training step on {size}, needs about\n{table}\n{fits}"
        if self.processes > 1:
            traffic = step_traffic(weights, thoughts, processes, chunk_count(self.length, self.anchor_chunk))
            text += f"\n\nwhat {self.processes} processes exchange in a step\n{traffic_table(traffic, processes)}"
        return text


def environment() -> str:
    """Versions, devices, and which back end serves each operation on each device, or why none does."""
    lines = [f"Python {platform.python_version()} on {platform.platform()}"]
    lines += [f"{name} {_version(name)}" for name in PACKAGES]
    lines += [cpu_library(), cuda_library(), cpu_products()]
    threads = torch.get_num_threads()
    devices = {"cpu": f"{threads} thread{'s' * (threads > 1)}"}
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        devices[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}, {human(free)} of {human(total)} free"
    for device, what in devices.items():
        lines += ["", f"{device} ({what})"]
        lines += [f"  {row['op']:<18} {row['backend']:<10} {row['status']}" for row in backends(device)]
        lines += [f"  linear_logprob keeps logits for its backward up to {human(default_keep_bytes(torch.device(device)))}"]
    return "\n".join(textwrap.fill(line, 80, subsequent_indent=" " * (32 if line[:1] == " " else 2)) for line in lines)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"
