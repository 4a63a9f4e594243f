"""A process of several that train digit sums: ``python digit_sums_process.py MODEL OUT STEPS`` with torchrun's variables."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import sums  # noqa: E402

from quietstar.run.processes import process_state  # noqa: E402

if __name__ == "__main__":
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(sys.argv[1])
    setting = replace(sums.EQUALS_ONLY, steps=int(sys.argv[3]))
    sums.training.train_thoughts(model, setting, sums.QUIET_STAR, *sums.split_strings(0), 0, Path(sys.argv[2]))
    process_state().destroy_process_group()
