"""``quietstar doctor``"""

from __future__ import annotations

import platform
import textwrap
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, ClassVar

import psutil
import torch
from tyro.conf import arg

from quietstar.checkpoints.pretrained import load_config, load_model, load_tokenizer
from quietstar.cli.common import this_machine
from quietstar.cli.entry import version_of
from quietstar.cli.errors import UsageError
from quietstar.cli.ignored import Rule
from quietstar.cli.train import Train
from quietstar.config import AdapterConfig, ThoughtConfig, TrainConfig
from quietstar.data.texts import DataConfig
from quietstar.data.thoughts import ThoughtRecord, open_records
from quietstar.hf.verify import verify
from quietstar.memory.fit import Plan, too_large
from quietstar.memory.processes import (
    Processes,
    base_copy,
    chunk_count,
    count_weights,
    gathered_dtype,
    process_memory,
    step_traffic,
    traffic_table,
)
from quietstar.memory.step import StepMemory, human, memory_table, step_memory, thinking_places
from quietstar.model import QuietStar
from quietstar.testing import tiny_model
from quietstar.thinking.text_thoughts import Marks
from quietstar_kernels import backends, cpu_library, cuda_library
from quietstar_kernels.cpu.products import cpu_products
from quietstar_kernels.linear_logprob import default_keep_bytes

MOST_ROWS = 2**40  # more than any memory holds, and few enough that no product of sizes overflows
OF_TRAIN = {field.name for kind in (Train, DataConfig, ThoughtConfig, TrainConfig, AdapterConfig) for field in fields(kind)}
OF_TRAIN -= {"model", "train", "lora"}
PACKAGES = ("quietstar-kernels", "torch", "triton", "transformers", "accelerate", "datasets")


@dataclass(kw_only=True)
class Doctor(Train):
    """Print versions, devices and back ends; with --model and the options of train, the memory of a step."""

    model: Annotated[str, arg(help="hub name, folder or GGUF file of a model; only its config is read")] = ""
    processes: Annotated[int, arg(help="processes that train together; prints what they exchange")] = 1
    verify: Annotated[bool, arg(help="also load the weights, and compare thoughts with ordinary forward passes")] = False

    ignored: ClassVar[list] = [
        Rule(" ".join(sorted(OF_TRAIN | {"processes", "verify"})), lambda o: not o.model, "without --model"),
        *Train.ignored,
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
        # Those of ``quietstar train``, which are loaded here too; some only with a model or a step.
        step = QuietStar(tiny_model(), ThoughtConfig(thoughts=1, thought_tokens=1, lookahead=1), verify=False)
        step(torch.zeros(1, 3, dtype=torch.int64)).loss.backward()
        if self.lora.lora_rank and find_spec("peft"):
            import_module("peft")
        libraries = psutil.Process().memory_info().rss
        # 1. The largest part of a step that runs at once.
        config, thoughts, train, length = load_config(self.model), self.thoughts, self.train, self.data.length
        if self.processes < 1:
            raise UsageError("--processes must be 1 or more")
        each = -(-train.batch_size // self.processes)
        chunk = 1 if train.anchor_chunk == "auto" else train.anchor_chunk
        plan = Plan(-(-each // train.accumulation), self.gradient_checkpointing, chunk)
        most = plan.texts * length * (1 + thoughts.thoughts * thoughts.rows)
        if most > MOST_ROWS:
            raise UsageError(f"--batch-size, --length and thoughts make {most:,} rows, and {MOST_ROWS:,} are the most")
        # 2. Its rows: how many positions think, and how long the longest thought is.
        places = thinking_places(thoughts, length)
        if self.thoughts_from:
            places = max(
                (length if x.anchors is None else len(x.anchors) for _, x in open_records(self.thoughts_from, ThoughtRecord)),
                default=0,
            )
        if thoughts.written:  # the strings around a thought
            marks = Marks.of(thoughts, load_tokenizer(self.model))
            assert marks is not None
            thoughts = replace(thoughts, thought_tokens=thoughts.thought_tokens + len(marks.start) + len(marks.end) - 2)
        rows = plan.texts * (length + places * thoughts.thoughts * thoughts.rows)
        # 3. Bytes of it, by numbers of texts and anchors.
        dtype = getattr(torch, self.dtype)
        gathered = train.rollout_weights == "gathered"
        if gathered and train.sharding != "full_shard":
            raise UsageError("--rollout-weights=gathered needs --sharding=full_shard")
        processes = Processes(self.processes, train.sharding, dtype, gathered_dtype(dtype, train.precision), gathered)
        weights = count_weights(config, self.lora, thoughts.mixing != "none")

        @cache
        def estimate(texts: int, anchor_chunk: int | None) -> StepMemory:
            adapters = self.lora.lora_rank > 0
            memory = step_memory(
                config, thoughts, texts, length, processes.computed, anchor_chunk, places=places, adapters=adapters
            )
            memory = process_memory(memory, weights, processes)
            moments = memory.moments // 4 if train.optimizer == "8bit" else memory.moments
            return replace(memory, weights=memory.weights + base_copy(weights, thoughts, dtype, adapters), moments=moments)

        # 4. The tables, and whether it fits.
        memory = estimate(plan.texts, plan.anchor_chunk)
        size = f"{plan.texts} x {length} tokens, {rows:,} rows with thoughts"
        table = memory_table(memory, libraries, plan.checkpointing)
        machine = this_machine(self.processes)
        reason = too_large(plan, length, estimate, machine, each)
        fits = f"doesn't fit: {reason}" if reason else f"fits in the {human(machine.free)} that are free"
        text = f"{self.model}: a training step on {size}, needs about\n{table}\n{fits}"
        if self.processes > 1:
            traffic = step_traffic(weights, thoughts, processes, chunk_count(places, plan.anchor_chunk))
            text += f"\n\nwhat {self.processes} processes exchange in a step\n{traffic_table(traffic, processes)}"
        return text


def environment() -> str:
    """Versions, devices, and which back end serves each operation on each device, or why none does."""
    lines = [f"Python {platform.python_version()} on {platform.platform()}"]
    lines += [f"{name} {version_of(name) or 'is not installed'}" for name in PACKAGES]
    lines += [cpu_library(), cuda_library(), cpu_products()]
    threads = torch.get_num_threads()
    devices = {"cpu": f"{threads} thread{'s' * (threads > 1)}"}
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        devices[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}, {human(free)} of {human(total)} free"
    for device, what in devices.items():
        lines += ["", f"{device} ({what})"]
        lines += [f"  {row['op']:<18} {row['backend']:<10} {row['status']}" for row in backends(device)]
        kept = default_keep_bytes(torch.device(device)) / 2**20
        lines += [f"  linear_logprob keeps logits for its backward up to {kept:,.0f} MiB"]
    return "\n".join(textwrap.fill(line, 80, subsequent_indent=" " * (32 if line[:1] == " " else 2)) for line in lines)
