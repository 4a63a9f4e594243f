"""The memory and traffic of one process, against real models and by hand; the table in docs/large-models.md."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from quietstar import QuietStar, ThoughtConfig
from quietstar.cli import main as cli
from quietstar.config import AdapterConfig
from quietstar.memory.processes import Processes, count_weights, process_memory, step_traffic
from quietstar.memory.step import GPU_BYTES, human, step_memory
from tests.quietstar.memory.test_step import REAL

THOUGHTS = ThoughtConfig(thoughts=2, thought_tokens=4, lookahead=3)
B, L = 2, 16


@pytest.mark.parametrize("name, dtype", REAL)
def test_weights_are_those_of_a_real_model(tiny, name, dtype):
    model = tiny(name)
    qs = QuietStar(model.to(dtype), THOUGHTS, verify=False)
    weights = count_weights(model.config)
    assert weights.layers == sum(x.numel() for n, x in model.named_parameters() if ".layers." in n or ".h." in n)
    assert weights.layers + weights.head + weights.rest == weights.trained == sum(x.numel() for x in qs.parameters())
    assert weights.bytes(dtype) == weights.gradient_bytes(dtype) == sum(x.nbytes for x in qs.parameters())
    alone = step_memory(model.config, THOUGHTS, B, L, dtype)
    assert process_memory(alone, weights, Processes(1, "no", dtype, dtype)) == alone


@pytest.mark.parametrize("targets", ["all-linear", "q_proj, v_proj"])
def test_adapters_are_those_of_peft(tiny, targets):
    pytest.importorskip("peft")
    adapters = AdapterConfig(lora_rank=3, lora_targets=targets)
    qs = QuietStar(tiny("llama").bfloat16(), THOUGHTS, verify=False)
    qs.add_adapters(adapters)
    weights = count_weights(qs.config, adapters)
    assert weights.bytes(torch.bfloat16) == sum(x.nbytes for x in qs.parameters())
    assert weights.trained == sum(x.numel() for x in qs.parameters() if x.requires_grad)
    assert weights.gradient_bytes(torch.bfloat16) == sum(x.nbytes for x in qs.parameters() if x.requires_grad)


def test_memory_of_a_process(tiny):
    """Four processes: a quarter of everything, and what is gathered at a time."""
    config = tiny("llama").config
    alone, weights = step_memory(config, THOUGHTS, B, L), count_weights(config)

    def sharded(sharding, computed=torch.float32):
        return process_memory(alone, weights, Processes(4, sharding, torch.float32, computed))

    full, moments = sharded("full_shard"), sharded("shard_grad_op")
    assert full.moments == moments.moments == alone.moments // 4
    assert full.weights == alone.weights // 4 + 4 * (weights.rest + 2 * weights.layer + weights.head)
    assert moments.weights == alone.weights // 4 + alone.weights
    assert full.gradients == alone.gradients // 4 + 4 * (weights.rest + 2 * weights.layer)
    assert sharded("full_shard", torch.bfloat16).weights == full.weights - 2 * (weights.rest + 2 * weights.layer)
    assert sharded("no", torch.bfloat16).weights == alone.weights + 2 * weights.layers
    rollout = process_memory(alone, weights, Processes(4, "full_shard", gathered=True))
    assert rollout == replace(full, rollout=full.rollout + 4 * (weights.layers - 2 * weights.layer))
    for part in ("text", "thoughts", "head_on_cpu", "head_on_gpu"):
        assert getattr(full, part) == getattr(alone, part)


def test_passes_through_the_layers(tiny):
    """The rollout's text and T rows, forward and backward; tests/quietstar/run/test_processes.py measures real ones."""
    weights = count_weights(tiny("llama").config)

    def gathered(sharding, chunks=1, whole=False):
        traffic = step_traffic(weights, THOUGHTS, Processes(2, sharding, gathered=whole), chunks)
        return (traffic.all_gather - 4 * weights.rest) / 4

    T, heads = THOUGHTS.thought_tokens, weights.head
    assert gathered("full_shard") == (1 + T + 2) * weights.layers + 2 * heads
    assert gathered("full_shard", 3) == (1 + 3 * T + 2 + 3 * 3) * weights.layers + 6 * heads
    assert gathered("full_shard", 3, whole=True) == (1 + 2 + 3 * 3) * weights.layers + 7 * heads
    assert gathered("shard_grad_op") == weights.layers + heads


def test_the_command_prints_what_processes_need_and_exchange(tiny, tmp_path, capsys):
    tiny("llama").config.save_pretrained(tmp_path)
    arguments = ["doctor", f"--model={tmp_path}", "--length=16", "--thought-tokens=4", "--lookahead=3"]
    assert cli.main([*arguments, "--processes=4", "--sharding=full_shard", "--lora-rank=2", "--anchor-chunk=8"]) == 0
    printed = capsys.readouterr().out
    assert "sent by each of 4, in a ring" in printed and "gradients summed and sharded" in printed
    assert cli.main(arguments) == 0
    assert "sent by each" not in capsys.readouterr().out
    assert cli.main([*arguments, "--processes=0"]) == cli.USAGE
    assert cli.main([*arguments, "--processes=4", "--sharding=full_shard", "--rollout-weights=gathered"]) == 0
    assert cli.main([*arguments, "--processes=4", "--rollout-weights=gathered"]) == cli.USAGE


SHAPES = {
    "7B": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    "70B": {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
}
SHAPES["7B"] |= {"num_key_value_heads": 8, "vocab_size": 32000}
SHAPES["70B"] |= {"num_key_value_heads": 8, "vocab_size": 128256}
# Model, W, sharding, rank of adapters.
TABLE = [("7B", 8, sharding, 0) for sharding in ("no", "full_shard", "shard_grad_op")]
TABLE += [("7B", 8, "no", 16), ("70B", 64, "full_shard", 0), ("70B", 64, "shard_grad_op", 0), ("70B", 8, "full_shard", 16)]
HEADINGS = "model|W|`--sharding`|LoRA|weights|gradients|moments|thoughts and text|the same, checkpointed|together|gathered|sent"


def docs_table():
    """The rows of docs/large-models.md."""
    alone = {
        name: step_memory(AutoConfig.for_model("llama", **shape), ThoughtConfig(), 1, 256, torch.bfloat16, gpu_bytes=GPU_BYTES)
        for name, shape in SHAPES.items()
    }
    lines = [f"| {HEADINGS.replace('|', ' | ')} |", "|" + "---|" * 12]
    for name, W, sharding, rank in TABLE:
        weights = count_weights(AutoConfig.for_model("llama", **SHAPES[name]), AdapterConfig(lora_rank=rank))
        processes = Processes(W, sharding, torch.bfloat16 if rank else torch.float32, torch.bfloat16)
        memory, traffic = process_memory(alone[name], weights, processes), step_traffic(weights, ThoughtConfig(), processes)
        parts = [memory.weights, memory.gradients, memory.moments, memory.text + memory.thoughts, memory.checkpointed]
        sizes = [*parts, memory.peak(checkpointing=True), traffic.all_gather, traffic.sent(W)]
        cells = [name, str(W), f"`{sharding}`", str(rank or "-"), *(human(size) if size else "-" for size in sizes)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


@pytest.mark.long
def test_the_table_of_the_docs():
    page = (Path(__file__).parents[3] / "docs/large-models.md").read_text()
    table = page.split("test_processes.py -->\n")[1].split("\n<!-- table: end")[0]
    assert table.splitlines() == docs_table()
