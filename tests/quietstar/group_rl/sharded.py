"""Jobs of group RL for two processes: ``python sharded.py jobs.json`` in each, started by ``tests.quietstar.run.processes``.

A job trains stock TRL and its twin with shared prompts in one setting. It is a dict: model, a folder; trainer, a name; options,
of its config; fsdp, of its ``fsdp_config``; lora; completions, "random", "generate" or "vllm"; and whether to train stock TRL
without sharding or half precision too. Or it calls ``shared_logprobs``: sequences, of each process; options; how to shard; with
a teacher, ``shared_divergence``.
"""

import copy
import json
import os
import random
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import trl
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from trainers import PAIRS, V, config_of, number_tokenizer, sum_of_ids
from transformers import AutoModelForCausalLM

import quietstar
from quietstar.hf.modules import unwrapped
from quietstar.run.sharding import whole

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "gate_proj"], init_lora_weights=False)
FSDP2 = {"fsdp_version": 2, "reshard_after_forward": True, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}


def shard_on_cpus() -> None:
    """Accelerate switches FSDP on for GPUs alone; from here on it does for CPUs too, and all that follows is its own code."""
    init = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = with_fsdp


def forget_accelerate() -> None:
    """So that the next trainer chooses anew."""
    AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        del os.environ[name]


def completions(trainer, count):
    """Of 1 to 2 tokens in process 0 and of 1 to 8 in process 1, about half of them ended."""
    rank = trainer.accelerator.process_index
    draw = random.Random(10 * trainer._step + rank)
    return [
        [draw.randrange(3, V) for _ in range(draw.randrange(1, 8 if rank else 2))] + draw.choice([[], [2]])
        for _ in range(count)
    ]


class VLLM:
    """In place of TRL's, with log-probabilities of its own."""

    mode = "server"

    def __init__(self, trainer):
        self.trainer = trainer

    def sync_weights(self):
        pass

    def generate(self, prompts, num_generations, **_):
        rows = completions(self.trainer, len(prompts))
        return prompts, rows, [[[-3.5 - 0.01 * i] for i, _ in enumerate(row)] for row in rows], None


def weights_of(model):
    return [whole(weight.detach()).clone() for weight in model.parameters()]


def train(cls, job, folder):
    """A trainer after its steps, and how its weights moved."""
    torch.manual_seed(0)
    usual = {"max_completion_length": 8, "per_device_train_batch_size": 4, "ddp_timeout": 60, "max_steps": 2}
    usual |= {"model_init_kwargs": {"dtype": "auto"}}
    if job["fsdp"] is not None:  # else DistributedDataParallel
        usual |= {"fsdp": True, "fsdp_config": FSDP2 | job["fsdp"]}
    data = Dataset.from_list([{"prompt": " ".join(str(3 + 5 * i + j) for j in range(1 + 3 * (i % 3)))} for i in range(8)])
    lora = LORA if job.get("lora") else None
    arguments = config_of(cls, folder, **usual | job["options"])
    trainer = cls(
        job["model"], job.get("teacher", sum_of_ids), arguments, data, processing_class=number_tokenizer(), peft_config=lora
    )
    kind = job.get("completions", "random")
    if kind == "random":
        trainer._generate_single_turn = lambda prompts, *_: (completions(trainer, len(prompts)), None)
    elif kind == "vllm":
        trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, VLLM(trainer), -1
    before = weights_of(trainer.model)
    trainer.train()
    return trainer, [x.double() - y.double() for x, y in zip(weights_of(trainer.model), before, strict=True)]


def farthest(some, others):
    return max(float((x - y).norm()) for x, y in zip(some, others, strict=True))


def training(job):
    """How far weights are from stock TRL's, in units of how far they moved, and what was sharded."""
    cls = getattr(trl, job.get("trainer", "GRPOTrainer"))
    pairs = [(cls, job), (PAIRS[cls], job)]
    if job.get("exact"):
        pairs.append((cls, job | {"fsdp": None, "options": job["options"] | {"bf16": False, "cast_lm_head_to_fp32": False}}))
    moves, sharded = [], []
    for one, setting in pairs:
        trainer, moved = train(one, setting, Path(job["model"]))
        moves.append(moved)
        sharded.append(
            isinstance(trainer.model_wrapped, FSDPModule) and all(isinstance(x, DTensor) for x in trainer.model.parameters())
        )
        forget_accelerate()
    return {"sharded": sharded} | compared(moves)


def compared(moves):
    """How far weights of stock TRL, ours, and perhaps exact ones are from each other, in units of how far they moved."""
    stock, ours, *exact = moves
    moved = max(float(x.norm()) for x in stock)
    result = {"moved": moved, "ours to stock": farthest(ours, stock) / moved}
    if exact:
        result |= {"ours": farthest(ours, exact[0]) / moved, "stock": farthest(stock, exact[0]) / moved}
    return result


def shard(model, how):
    """The weights of a Llama over the processes; "tail": with its head as a group of its own, as Accelerate has it."""
    mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.bfloat16) if "bf16" in how else MixedPrecisionPolicy()
    llama = unwrapped(model)
    for layer in llama.model.layers:
        fully_shard(layer, mp_policy=mixed)
    if "tail" in how:
        fully_shard(llama.lm_head, mp_policy=mixed)
    return fully_shard(model, mp_policy=mixed)


def weighted(values, entropies):
    """A loss that each of them has another part in."""
    weights = [torch.arange(1, len(x) + 1).to(x) / len(x) for x in values]
    return sum((w * x + 0.3 * w * w * h).sum() for w, x, h in zip(weights, values, entropies, strict=True))


def logprobs(job):
    """The results of a sharded model and of the whole one, and how far their gradients are from each other."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    quietstar.register_attention("sdpa")
    model = AutoModelForCausalLM.from_pretrained(job["model"], attn_implementation="quietstar", dtype="auto")
    if job.get("lora"):
        model = get_peft_model(model, LORA)
    alone = copy.deepcopy(model)
    model = shard(model, job["how"])
    if "teacher" in job:
        load = partial(AutoModelForCausalLM.from_pretrained, job["teacher"], attn_implementation="quietstar", dtype="auto")
        teachers = {model: shard(load(), job["how"]), alone: load()}

    def loss(model, sequences, **options):
        if "teacher" in job:
            values = quietstar.shared_divergence(model, teachers[model], sequences, **options)
            entropies = [torch.zeros_like(x) for x in values]
        else:
            values, entropies = quietstar.shared_logprobs(model, sequences, return_entropy=True, **options)
        return weighted(values, entropies), [x.tolist() for x in values], [h.tolist() for h in entropies]

    options = job["options"]
    with torch.no_grad():  # as for old log-probabilities
        early = loss(model, job["without_grad"][rank], **options)[1]
    got, values, entropies = loss(model, job["sequences"][rank], **options)
    got.backward()
    whole_options = {name: value for name, value in options.items() if name != "max_rows"}
    parts = [loss(alone, sequences, **whole_options) for sequences in job["sequences"]]
    (sum(part[0] for part in parts) / len(parts)).backward()  # FSDP2 takes the mean over processes
    pairs = [(x, y) for x, y in zip(model.parameters(), alone.parameters(), strict=True) if y.grad is not None]
    assert all(isinstance(x.grad, DTensor) for x, _ in pairs)
    return {
        "early": [len(x) for x in early],
        "values": [values, parts[rank][1]],
        "entropies": [entropies, parts[rank][2]],
        "gradients": max(float((whole(x.grad) - y.grad).norm() / y.grad.norm()) for x, y in pairs),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    shard_on_cpus()
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = [(training if "fsdp" in job else logprobs)(job) for job in json.loads(Path(sys.argv[1]).read_text())]
    rank = torch.distributed.get_rank()
    Path(sys.argv[1]).with_name(f"results-{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
