"""Jobs of group RL under DeepSpeed's ZeRO for two processes without GPUs: ``python zero.py jobs.json``, as for sharded.py.

A job is one of sharded.py's with a stage. For ``shared_logprobs`` it is also how the model is made: "lora", "zero.Init".
"""

import copy
import json
import os
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import sharded
import torch
import transformers
import trl
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from deepspeed.utils import safe_get_full_fp32_param
from peft import get_peft_model
from sharded import LORA, compared, farthest, train, weighted
from trainers import PAIRS
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

import quietstar


def configured(stage):
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # else small weights stay whole
    return {"zero_optimization": zero, "gradient_clipping": "auto", "bf16": {"enabled": "auto"}} | {
        f"{name}": "auto" for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    }


def on_cpus():
    """DeepSpeed without its compiled operation, and Accelerate and transformers with DeepSpeed where they want a GPU for it."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def weights_of(model):
    """Whole, and in fp32 where there is an fp32 copy of half precision."""
    found = list(model.parameters())
    with deepspeed.zero.GatheredParameters(found) if hasattr(found[0], "ds_id") else nullcontext():
        whole = [weight.detach().clone() for weight in found]
    if whole[0].dtype != torch.bfloat16:
        return whole
    exact = [hasattr(x, "_z3_optimizer") or hasattr(x, "_hp_mapping") for x in found]
    return [
        safe_get_full_fp32_param(x).clone() if there and x.requires_grad else y
        for x, y, there in zip(found, whole, exact, strict=True)
    ]


def training(job):
    """How far weights are from stock TRL's, in units of how far they moved, and the stage and divided weights of each run."""
    cls = getattr(trl, job.get("trainer", "GRPOTrainer"))
    zero = job["options"] | {"use_cpu": False, "deepspeed": configured(job["stage"])}
    pairs = [(cls, zero), (PAIRS[cls], zero)]
    if job.get("exact"):
        pairs.append((cls, job["options"] | {"bf16": False, "cast_lm_head_to_fp32": False}))
    moves, stages = [], []
    for one, options in pairs:
        trainer, moved = train(one, job | {"fsdp": None, "options": options}, Path(job["model"]))
        moves.append(moved)
        if options is zero:
            divided = [hasattr(weight, "ds_id") for weight in trainer.model.parameters()]
            stages.append([trainer.model_wrapped.zero_optimization_stage(), sum(divided) / len(divided)])
        AcceleratorState._reset_state(True)
        unset_hf_deepspeed_config()
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]
    return {"stages": stages} | compared(moves)


def plain_logprobs(model, sequences):
    """With entropies: a forward for each sequence."""
    parts = [model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for ids in sequences]
    values = [
        part.gather(1, torch.tensor(ids[1:], dtype=torch.int64)[:, None])[:, 0]
        for part, ids in zip(parts, sequences, strict=True)
    ]
    return values, [-(part.exp() * part).sum(-1) for part in parts]


def logprobs(job):
    """Two steps of SGD with an engine, and of a whole model with the mean over processes of its losses."""
    rank = torch.distributed.get_rank()
    config = configured(job["stage"]) | {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    config |= {"gradient_clipping": 0.0, "bf16": {"enabled": False}, "zero_allow_untested_optimizer": True}
    quietstar.register_attention("sdpa")

    def load():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(job["model"], attn_implementation="quietstar")
        return get_peft_model(model, LORA) if "lora" in job["how"] else model

    alone = load()
    held = HfDeepSpeedConfig(config) if "zero.Init" in job["how"] else None  # from_pretrained divides weights while it exists
    model = load() if held else copy.deepcopy(alone)
    before = weights_of(alone)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    optimizer = torch.optim.SGD(alone.parameters(), 0.1)
    found = []
    for _ in range(2):
        got = quietstar.shared_logprobs(engine, job["sequences"][rank], return_entropy=True, **job["options"])
        engine.backward(weighted(*got))
        engine.step()
        parts = [plain_logprobs(alone, sequences) for sequences in job["sequences"]]
        (sum(weighted(*part) for part in parts) / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
        found += [[x.tolist() for values in pair for x in values] for pair in (got, parts[rank])]
    unset_hf_deepspeed_config()
    moved = max(float((x - y).norm()) for x, y in zip(alone.parameters(), before, strict=True))
    return {
        "values": found,
        "divided": all(hasattr(weight, "ds_id") for weight in engine.module.parameters()),
        "weights": farthest(weights_of(engine.module), list(alone.parameters())) / moved,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    on_cpus()
    deepspeed.init_distributed("gloo")
    sharded.weights_of = weights_of
    results = [(logprobs if "sequences" in job else training)(job) for job in json.loads(Path(sys.argv[1]).read_text())]
    rank = torch.distributed.get_rank()
    Path(sys.argv[1]).with_name(f"results-{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
