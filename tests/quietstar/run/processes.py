"""Jobs for one process or several: ``python processes.py jobs.json`` runs them in each that torchrun's variables describe.

A job is a dict: model, a folder; thoughts and train, fields of the configs; lengths of the texts; resume; checkpointing; the
rank of adapters; whether to evaluate and to count traffic; words, whether the model has a tokenizer; whether to use what was
trained.
"""

import json
import os
import socket
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from quietstar import QuietStar, ThoughtConfig
from quietstar.config import AdapterConfig, TrainConfig
from quietstar.evaluation.losses import evaluate, with_own_thoughts
from quietstar.evaluation.scoring import score_tokens
from quietstar.hf.modules import sharding_group
from quietstar.run.processes import process_state
from quietstar.run.sharding import gathered
from quietstar.testing import byte_tokenizer
from quietstar.thinking import cohorts
from quietstar.training import thought_loss, train


def texts(lengths):
    return [
        {"input_ids": torch.randint(3, 61, (length,), generator=torch.Generator().manual_seed(i))}
        for i, length in enumerate(lengths)
    ]


class Traffic(TorchDispatchMode):
    """Bytes of the whole tensors that each kind of collective made or reduced."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("c10d::")
        if name != func._schema.name and "wait" not in name:
            tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            size = max((x.nbytes for x in tensors), default=0)
            self.bytes[name] = self.bytes.get(name, 0) + size
        return func(*args, **(kwargs or {}))


def use(qs, rank):
    """Evaluation and generation, where processes have different texts; and what is refused."""
    qs.eval()
    mine, found = texts([9, 8, 7][rank:]), {}

    def write(new):
        ids = torch.stack([x["input_ids"][:7] for x in mine])
        return qs.generate(ids, torch.ones_like(ids), new, think="never", do_sample=False).tolist()

    def refused(function, *arguments, **options):
        try:
            function(*arguments, **options)
        except ValueError as error:
            return str(error)

    found["text"] = write(5 + 4 * rank)
    found["thoughts"] = [x["thought_ids"].tolist() for x in with_own_thoughts(qs, texts([9, 8]))]
    if sharding_group(qs.model) is not None:
        ids = torch.ones(1, 4, dtype=torch.int64)
        found["refused"] = [refused(evaluate, qs, mine), refused(score_tokens, qs, [[3, 4, 5]], [[1]])]
        found["refused"].append(refused(qs.generate, ids, torch.ones_like(ids), 2, think="always"))
    with suppress(KeyError), gathered(qs):
        assert sharding_group(qs.model) is None
        found["again"] = write(2 + 7 * rank)
        found["figures"] = evaluate(qs, mine)
        raise KeyError
    found["sharded"] = sharding_group(qs.model) is not None
    return found


def run_job(job):
    """Trains, and returns what this process saw: its thoughts by (step, text), bytes of each collective, dtypes at the end and
    the share of the rewards that are bf16 numbers.
    """
    torch.manual_seed(7)
    tokenizer = byte_tokenizer() if job.get("words") else None
    model = AutoModelForCausalLM.from_pretrained(job["model"])
    qs = QuietStar(model, ThoughtConfig(**job["thoughts"]), tokenizer, verify=False)
    torch.nn.init.normal_(qs.mixing_head[4].weight, 0, 0.2)
    if job.get("rank"):
        qs.add_adapters(AdapterConfig(lora_rank=job["rank"]))
    if job.get("checkpointing"):
        qs.gradient_checkpointing_enable()
    thoughts, steps, seen = {}, [], {}

    def loss(model, part, counts, seed):
        value, out = thought_loss(model, part, counts, seed)
        if seed not in steps:
            steps.append(seed)
        for text, ids in zip(part.sequence_ids[:, 0].tolist(), out.thought_ids.tolist(), strict=True):
            thoughts[f"{len(steps)} {text}"] = ids
        seen.update(reward=out.reward, nll_mix=out.nll_mix, logprob=out.logprob, loss=out.loss)
        return value, out

    config = TrainConfig(**job["train"])
    step, rows = cohorts._Rollout.step, {"steps": 0, "empty": 0}

    def counted(rollout, now, *results):
        rows["steps"] += 1
        rows["empty"] += not now
        return step(rollout, now, *results)

    cohorts._Rollout.step = counted
    with Traffic() if job.get("traffic") else nullcontext() as traffic:
        try:
            data, held_out = texts(job["lengths"]), partial(evaluate, examples=texts([9, 8, 9]), batch_size=2)
            held_out = held_out if job.get("evaluate") else None
            lines = train(qs, data, config, loss=loss, evaluate=held_out, resume=job.get("resume"), progress=False)
        except ValueError as error:
            return {"error": str(error)}
        finally:
            cohorts._Rollout.step = step
            AcceleratorState._reset_state()
    ranks = [process_state().process_index] if process_state().num_processes > 1 else [0, 1]
    used = [use(qs, rank) for rank in ranks] if job.get("use") else []
    AcceleratorState._reset_state()
    reward = seen["reward"][seen["reward"] != 0]
    return {
        "lines": lines,
        "thoughts": thoughts,
        "rollout": rows,
        "used": used,
        "traffic": traffic.bytes if traffic is not None else {},
        "dtypes": {name: str(x.dtype) for name, x in seen.items()},
        "rounded": float((reward == reward.bfloat16().float()).float().mean()),
    }


def start(arguments, processes):
    """Every process of a run, as torchrun would start them: its variables, without its agent."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    shared |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(processes), "PYTHONFAULTHANDLER": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *arguments], env=shared | {"RANK": str(i), "LOCAL_RANK": str(i)}, stderr=subprocess.PIPE, text=True
        )
        for i in range(processes)
    ]


def end(running, seconds):
    """What each process wrote to stderr until it ended, also printed; all are killed if one takes longer."""
    try:
        with ThreadPoolExecutor() as pool:  # a process whose pipe is full would hold up the others
            errors = list(pool.map(lambda process: process.communicate(timeout=seconds)[1], running))
    finally:
        for process in running:
            process.kill()
    print("\n".join(errors))
    return errors


def run_in_processes(jobs, processes, folder, seconds=600, script=__file__):
    """What ``run_job``, or another script's, returned for each job, in each process.

    Once, and in no launch that looked for it, a process vanished inside a gather: "A process that vanished" in docs/log.md.
    If a signal ends one, that is a warning with its stacks; twice in a row, it is an error.
    """
    file = Path(folder) / "jobs.json"
    file.write_text(json.dumps(jobs))
    for last in (False, True):
        running = start([script, str(file)], processes)
        errors = end(running, seconds)
        codes = [process.returncode for process in running]
        message = f"exit codes {codes}\n" + "\n".join(errors)
        if last or min(codes) >= 0:
            break
        warnings.warn(f"launched again: {message}", stacklevel=2)
    assert codes == [0] * processes, message
    results = [json.loads((Path(folder) / f"results-{i}.json").read_text()) for i in range(processes)]
    return [list(row) for row in zip(*results, strict=True)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = [run_job(job) for job in json.loads(Path(sys.argv[1]).read_text())]
    Path(sys.argv[1]).with_name(f"results-{process_state().process_index}.json").write_text(json.dumps(results))
    process_state().destroy_process_group()
