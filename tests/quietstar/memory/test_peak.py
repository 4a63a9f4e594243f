"""What ``quietstar doctor`` says that training takes on a CPU, against what a process took."""

import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quietstar import ThoughtConfig
from quietstar.memory.step import human, step_memory

B, L, THOUGHTS = 1, 32, ThoughtConfig(thoughts=2, thought_tokens=2, lookahead=2)


# A process's own peak begins with what the process that started it held, pytest's gigabytes. So a small one starts it.
MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
with open(sys.argv[1], "w") as peak:
    peak.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""


def run(*arguments, home):
    """What a command prints, and the peak of its resident memory, in bytes."""
    command = [sys.executable, "-c", MEASURE, "peak", sys.executable, "-m", "quietstar", *arguments]
    done = subprocess.run(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout, int((home / "peak").read_text()) * 1024


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="counts a CPU's memory, in Linux's unit")
def test_the_estimate_is_within_a_tenth_of_the_peak(byte_tokenizer, tmp_path, record_property):
    """A model of 45 million weights: 0.7 GiB of weights, gradients and moments, and about as much of everything else."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = AutoConfig.for_model("llama", vocab_size=32000, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(f"{i} lines of a text that is long enough for this" for i in range(20)))
    options = ["--model=model", f"--batch-size={B}", f"--length={L}", "--thoughts=2", "--thought-tokens=2", "--lookahead=2"]
    printed, _ = run("doctor", *options, home=tmp_path)
    libraries = float(re.search(r"Python and libraries +([0-9.]+) MiB", printed)[1]) * 2**20
    for how, checkpointing in (("plain", False), ("gradient-checkpointing", True)):
        estimated = step_memory(config, THOUGHTS, B, L).peak_on_cpu(libraries, checkpointing)
        assert checkpointing or re.search(f"together, a process on a CPU +{human(estimated)}", printed)
        train = ["--data=text.txt", "--no-pack", "--held-out=0", "--steps=2", f"--out={how}"] + [f"--{how}"] * checkpointing
        _, measured = run("train", *options, *train, home=tmp_path)
        record_property(
            "table", f"memory, {how}: {estimated / 2**20:.0f} MiB estimated, {measured / 2**20:.0f} MiB at the peak"
        )
        assert estimated == pytest.approx(measured, rel=0.1), how
