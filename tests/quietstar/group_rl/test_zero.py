"""Two processes with DeepSpeed's ZeRO: steps of TRL's trainers with shared prompts, and ``shared_logprobs``.

DeepSpeed isn't among the test dependencies: ``pip install deepspeed``, and ``pytest -m long`` of this file.
"""

from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("trl", minversion="1.16")  # Python 3.10 has an older one

from tests.quietstar.group_rl.test_shared_logprobs import SEQUENCES
from tests.quietstar.run.processes import run_in_processes

pytestmark = pytest.mark.long

TWICE = {"gradient_accumulation_steps": 2}
TRAINING = {
    "full": {"exact": True},
    "tied, accumulated": {"model": "tied", "options": TWICE},
    "several iterations": {"options": TWICE | {"num_iterations": 2, "gradient_checkpointing": False}},
    "reference": {"completions": "generate", "options": {"beta": 0.1, "max_grad_norm": 1.0}},
    "lora, reference": {"lora": True, "options": {"beta": 0.1}},
    "lora, generate": {"lora": True, "completions": "generate"},
    "vllm": {"completions": "vllm", "options": TWICE},
    "rloo": {"trainer": "RLOOTrainer", "completions": "generate"},
    "bf16": {"exact": True, "options": {"bf16": True}},
    "lora, bf16": {"exact": True, "lora": True, "options": {"bf16": True}},
}
TRAINING = {f"{name}, stage {stage}": job | {"stage": stage} for name, job in TRAINING.items() for stage in (2, 3)}
TRAINING["full, stage 1"] = {"stage": 1, "exact": True}
NONE = [[9]]
LOGPROBS = {
    "stage 1": {"stage": 1, "sequences": [SEQUENCES, NONE]},
    "stage 2": {"stage": 2, "sequences": [SEQUENCES[:2], SEQUENCES]},
    "stage 3": {"stage": 3, "sequences": [SEQUENCES[:2], SEQUENCES]},
    "none, stage 2": {"stage": 2, "sequences": [SEQUENCES, NONE]},
    "none, stage 3": {"stage": 3, "how": ["zero.Init"], "sequences": [NONE, SEQUENCES]},
    "tied, stage 3": {"stage": 3, "model": "tied", "sequences": [SEQUENCES, NONE]},
    "cut, stage 2": {"stage": 2, "sequences": [SEQUENCES, NONE], "options": {"max_rows": 8}},
    "cut, stage 3": {"stage": 3, "sequences": [SEQUENCES, NONE], "options": {"max_rows": 8}},
    "lora, stage 3": {"stage": 3, "how": ["lora"], "sequences": [SEQUENCES, NONE]},
    "lora, cut, stage 3": {"stage": 3, "how": ["lora"], "sequences": [SEQUENCES, NONE], "options": {"max_rows": 8}},
}


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory):
    """By name, what each process returned."""
    folder = tmp_path_factory.mktemp("zero")
    for name in ("plain", "tied"):
        model = tiny("llama", tie_word_embeddings=name == "tied")
        model.bfloat16().float().save_pretrained(folder / name)  # bf16 and fp32 runs begin with the same weights
    jobs = {**TRAINING, **LOGPROBS}
    usual = [{"options": {}, "how": []} | job | {"model": str(folder / job.get("model", "plain"))} for job in jobs.values()]
    script = str(Path(__file__).with_name("zero.py"))
    return dict(zip(jobs, run_in_processes(usual, 2, folder, script=script), strict=True))


@pytest.mark.parametrize("name", TRAINING)
def test_steps_of_trl(results, name):
    stage = TRAINING[name]["stage"]
    print(results[name][0])  # the figures of docs/group-rl.md
    for found in results[name]:
        assert found["moved"] > 0.01 and found["stages"] == [[stage, stage == 3]] * 2
        if "bf16" in name:
            assert found["ours"] <= 2 * found["stock"]
        else:
            assert found["ours to stock"] < 1e-5, found


@pytest.mark.parametrize("name", LOGPROBS)
def test_shared_logprobs(results, name):
    """Values and weights are those of a forward for each sequence of the whole model; a process without work takes part."""
    for found in results[name]:
        assert found["divided"] == (LOGPROBS[name]["stage"] == 3)
        for got, want in zip(found["values"][::2], found["values"][1::2], strict=True):
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(torch.tensor(x), torch.tensor(y), atol=1e-5, rtol=1e-5)
        assert found["weights"] < 1e-5
