"""What ``quietstar doctor`` says that training takes on a CPU, against what a process took."""

import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

THOUGHTS = ["--length=32", "--batch-size=1", "--thoughts=2", "--thought-tokens=2", "--lookahead=2"]
UNITS = {"MiB": 2**20, "GiB": 2**30}


def run(*arguments, home):
    """What a command prints, and the peak of its resident memory, in bytes."""
    with open(home / "output.txt", "w+") as output:
        process = subprocess.Popen([sys.executable, "-m", "quietstar", *arguments], cwd=home, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        printed = output.read()
    assert process.returncode == 0, printed
    return printed, usage.ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="counts a CPU's memory, in Linux's unit")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
def test_the_estimate_is_within_a_tenth_of_the_peak(byte_tokenizer, tmp_path, checkpointing, record_property):
    """A model of 45 million weights: 0.7 GiB of weights, gradients and moments, and about as much of everything else."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = AutoConfig.for_model("llama", vocab_size=32000, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(f"{i} lines of a text that is long enough for this" for i in range(20)))
    options = ["--model=model", *THOUGHTS, *(["--gradient-checkpointing"] if checkpointing else [])]
    printed, _ = run("doctor", *options, home=tmp_path)
    size, unit = re.search(r"together, a process on a CPU +([0-9.]+) (\w+)", printed).groups()
    estimated = float(size) * UNITS[unit]
    train = ["--data=text.txt", "--no-pack", "--held-out=0", "--steps=2", "--out=run"]
    _, measured = run("train", *options, *train, home=tmp_path)
    how = "checkpointed" if checkpointing else "not checkpointed"
    record_property("table", f"memory, {how}: {estimated / 2**20:.0f} MiB estimated, {measured / 2**20:.0f} MiB at the peak")
    assert estimated == pytest.approx(measured, rel=0.1)
