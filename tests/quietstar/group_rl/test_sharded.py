"""Two processes with FSDP2: steps of TRL's trainers with shared prompts, and ``shared_logprobs``."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", minversion="1.16")  # Python 3.10 has an older one

from tests.quietstar.group_rl.test_shared_logprobs import SEQUENCES
from tests.quietstar.run.processes import run_in_processes

pytestmark = pytest.mark.long

TWICE = {"gradient_accumulation_steps": 2}
TRAINING = {
    "full": {"exact": True},
    "tied, checkpointed": {"model": "tied", "options": TWICE},
    "checkpointed by FSDP, loaded by process 0": {
        "fsdp": {"activation_checkpointing": True, "cpu_ram_efficient_loading": True},
        "options": {"activation_checkpointing": False},
    },
    "several iterations": {"options": TWICE | {"num_iterations": 2}},
    "weights kept": {"fsdp": {"reshard_after_forward": False}, "options": {"loss_type": "bnpo", "top_entropy_quantile": 0.5}},
    "reference": {"completions": "generate", "options": {"beta": 0.1, "max_grad_norm": 1.0}},
    "lora, reference": {"lora": True, "options": {"beta": 0.1}},
    "lora, generate": {"lora": True, "completions": "generate"},
    "vllm": {"completions": "vllm", "options": TWICE},
    "rloo": {"trainer": "RLOOTrainer", "completions": "generate"},
    "bf16": {"model": "fp32", "exact": True, "options": {"bf16": True}},
    "bf16, head in fp32": {"model": "fp32", "exact": True, "options": {"bf16": True, "cast_lm_head_to_fp32": True}},
    "lora, bf16": {"model": "fp32", "exact": True, "lora": True, "options": {"bf16": True}},
    "distillation": {"trainer": "DistillationTrainer", "teacher": True, "completions": "generate"},
}
NONE = [[9]]
TEMPERATURES = [0.5, 2.0, 0.5, 1.0, 1.0, 2.0, 1.0]
LOGPROBS = {
    "uneven": {"sequences": [SEQUENCES[:2], SEQUENCES]},
    "none": {"how": ["tail"], "sequences": [SEQUENCES, NONE], "without_grad": [SEQUENCES, []]},
    "cut": {"sequences": [SEQUENCES, [[5, 6, 7]]], "options": {"max_rows": 8}},
    "cut, none": {"how": ["tail"], "sequences": [NONE, SEQUENCES], "options": {"max_rows": 8}, "without_grad": [[], SEQUENCES]},
    "temperatures": {"sequences": [SEQUENCES, SEQUENCES], "options": {"temperature": TEMPERATURES}},
    "lora": {"lora": True, "how": ["tail"], "sequences": [SEQUENCES, NONE]},
    "divergence": {"teacher": True, "how": ["tail"], "sequences": [SEQUENCES, SEQUENCES[:2]], "options": {"beta": 0.5}},
    "divergence, none": {"teacher": True, "sequences": [NONE, SEQUENCES], "without_grad": [[], SEQUENCES]},
    "half precision": {"model": "fp32", "how": ["tail", "bf16"], "sequences": [SEQUENCES, NONE]},
}


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory):
    """By name, what each process returned."""
    folder = tmp_path_factory.mktemp("sharded")
    tiny("llama").double().save_pretrained(folder / "fp64")
    tiny("llama", tie_word_embeddings=True).double().save_pretrained(folder / "tied")
    tiny("llama").save_pretrained(folder / "fp32")
    tiny("qwen3", seed=1).double().save_pretrained(folder / "teacher")
    usual = {name: {"fsdp": {}} | job for name, job in TRAINING.items()}
    usual |= {name: {"how": [], "without_grad": job["sequences"]} | job for name, job in LOGPROBS.items()}
    jobs = [{"options": {}} | job | {"model": str(folder / job.get("model", "fp64"))} for job in usual.values()]
    for job in jobs:
        job.update({name: str(folder / name) for name in job if name == "teacher"})
    script = str(Path(__file__).with_name("sharded.py"))
    return dict(zip(usual, run_in_processes(jobs, 2, folder, script=script), strict=True))


@pytest.mark.parametrize("name", TRAINING)
def test_steps_of_trl(results, name):
    print(results[name][0])  # the table of docs/group-rl.md
    for found in results[name]:
        assert found["moved"] > 0.01 and all(found["sharded"][:2])
        if "bf16" in name:
            assert found["ours"] <= 2 * found["stock"]
        else:
            assert found["ours to stock"] < 1e-6, found


@pytest.mark.parametrize("name", LOGPROBS)
def test_shared_logprobs(results, name):
    """Those of the whole model, and the mean over processes of its gradients; a process without work takes part."""
    job = LOGPROBS[name]
    bounds = {"atol": 0.1, "rtol": 0.05} if name == "half precision" else {"atol": 1e-6, "rtol": 1e-6}
    for rank, found in enumerate(results[name]):
        assert found["early"] == [max(len(x) - 1, 0) for x in job.get("without_grad", job["sequences"])[rank]]
        for got, want in (found["values"], found["entropies"]):
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(torch.tensor(x), torch.tensor(y), **bounds)
        assert found["gradients"] < (0.1 if name == "half precision" else 1e-6)
    if name == "half precision":  # what leaves the model is not rounded to its policy's dtype
        values = torch.tensor(sum(results[name][0]["values"][0], []))
        assert (values == values.bfloat16().float()).float().mean() < 0.2
