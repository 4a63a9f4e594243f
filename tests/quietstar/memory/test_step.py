"""The memory of a step from the config alone, against real models and what autograd really keeps."""

import inspect
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from quietstar import QuietStar, ThoughtConfig
from quietstar.cli import main as cli
from quietstar.config import AdapterConfig
from quietstar.memory.processes import Processes, StepTraffic, chunk_count, count_weights, process_memory, step_traffic
from quietstar.memory.step import CHUNK_COPIES, HEAD_CHUNK, HEAD_KEPT, StepMemory, human, memory_table, step_memory
from quietstar_kernels import linear_logprob
from quietstar_kernels.cpu import _head

THOUGHTS = ThoughtConfig(thoughts=2, thought_tokens=4, lookahead=3)
B, L = 2, 16
ROWS = L * THOUGHTS.thoughts * THOUGHTS.rows


def kept_by_autograd(qs):
    """Bytes that a real training forward keeps for its backward, weights apart."""
    weights = {x.untyped_storage().data_ptr() for x in [*qs.parameters(), *qs.buffers()]}
    kept = {}

    def note(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = qs.train()(torch.randint(3, 61, (B, L), generator=torch.Generator().manual_seed(0)))
    assert out.loss.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral", "phi3"])
def test_against_a_real_step(tiny, name, dtype):
    model = tiny(name, attn_pdrop=0.0) if name == "gpt2" else tiny(name)
    qs = QuietStar(model.to(dtype), THOUGHTS, verify=False)
    memory = step_memory(model.config, THOUGHTS, B, L, dtype)
    weights = sum(x.numel() * x.element_size() for x in qs.parameters())
    assert (memory.weights, memory.gradients, memory.moments) == (weights, weights, 2 * weights)
    ratio = (memory.text + memory.thoughts + memory.mixing) / kept_by_autograd(qs)
    assert 1 / 1.3 < ratio < 1.3


def test_parts_follow_the_sizes(tiny):
    config = tiny("llama").config
    memory = step_memory(config, THOUGHTS, B, L)
    twice = step_memory(config, THOUGHTS, 2 * B, L)
    assert twice.weights == memory.weights
    assert twice.thoughts == pytest.approx(2 * memory.thoughts, rel=0.01)
    assert memory.thoughts / memory.text == pytest.approx(ROWS / L, rel=0.01)
    # Two layers, keys and values of two heads of width 16, fp32; T rows of each thought.
    assert memory.rollout == B * (L + L * 2 * 4) * 2 * 2 * (2 * 16) * 4
    assert memory.peak(checkpointing=True) < memory.peak()


def test_a_large_model_costs_nothing_to_ask_about():
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = AutoConfig.for_model("llama", num_key_value_heads=8, vocab_size=128256, **sizes)
    began = time.process_time()
    memory = step_memory(config, ThoughtConfig(), 1, 256, torch.bfloat16)
    assert time.process_time() - began < 60
    assert 130 < memory.weights / 2**30 < 135


def test_a_model_that_cannot_think_is_refused():
    with pytest.raises(ValueError, match="cannot think"):
        step_memory(AutoConfig.for_model("mamba"), THOUGHTS, B, L)


def test_the_head_is_that_of_the_kernels():
    assert HEAD_CHUNK == _head.LOGITS
    assert HEAD_KEPT == inspect.signature(linear_logprob).parameters["keep_bytes"].default


def test_what_is_printed():
    assert [human(size) for size in (0, 1023, 1024, 3 * 2**20, 5.5 * 2**30, 2**41)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "3.0 MiB",
        "5.5 GiB",
        "2.00 TiB",
    ]
    table = memory_table(StepMemory(*[2**30] * 9))
    assert table.count("GiB") == 11 and "together" in table


def test_chunks_of_anchors(tiny):
    """Thoughts of a chunk alone; the text's keys and values are there some more times."""
    config = tiny("llama").config
    whole, chunk = (step_memory(config, THOUGHTS, B, L, anchor_chunk=size) for size in (None, L // 4))
    keys_values = 2 * 2 * (2 * 16) * 4
    assert chunk.thoughts == pytest.approx(whole.thoughts / 4, rel=0.01)
    assert chunk.text == whole.text + CHUNK_COPIES * B * L * keys_values
    assert chunk.rollout == B * (L + L // 4 * 2 * 4) * keys_values
    assert chunk.peak() < whole.peak() and chunk.weights == whole.weights
    assert chunk_count(L, None) == 1 and chunk_count(L, 5) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral", "phi3"])
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
    """Four processes: a quarter of everything, and what is whole at a time."""
    config = tiny("llama").config
    alone, weights = step_memory(config, THOUGHTS, B, L), count_weights(config)

    def cut(sharding, computed=torch.float32):
        return process_memory(alone, weights, Processes(4, sharding, torch.float32, computed))

    full, moments = cut("full_shard"), cut("shard_grad_op")
    assert full.moments == moments.moments == alone.moments // 4
    assert full.weights == alone.weights // 4 + 4 * (weights.rest + 2 * weights.layer + weights.head)
    assert moments.weights == alone.weights // 4 + alone.weights
    assert full.gradients == alone.gradients // 4 + 4 * (weights.rest + 2 * weights.layer)
    assert cut("full_shard", torch.bfloat16).weights == full.weights - 2 * (weights.rest + 2 * weights.layer)
    assert cut("no", torch.bfloat16).weights == alone.weights + 2 * weights.layers
    assert (full.text, full.thoughts, full.head) == (alone.text, alone.thoughts, alone.head)


def test_traffic_in_a_ring():
    assert StepTraffic(800, 80, 0).sent(8) == 770 and StepTraffic(all_reduce=80).sent(8) == 140
    assert StepTraffic(800, 80, 8).sent(1) == 0


def test_passes_through_the_layers(tiny):
    """Text and T rows of the rollout, forward and backward; see test_processes.py for the bytes of real ones."""
    weights = count_weights(tiny("llama").config)

    def gathered(sharding, chunks=1):
        traffic = step_traffic(weights, THOUGHTS, Processes(2, sharding), chunks)
        return (traffic.all_gather - 4 * weights.rest) / 4

    T, heads = THOUGHTS.thought_tokens, weights.head
    assert gathered("full_shard") == (1 + T + 2) * weights.layers + 2 * heads
    assert gathered("full_shard", 3) == (1 + 3 * T + 2 + 3 * 3) * weights.layers + 6 * heads
    assert gathered("shard_grad_op") == weights.layers + heads


def test_the_command_prints_what_processes_need_and_exchange(tiny, tmp_path, capsys):
    tiny("llama").config.save_pretrained(tmp_path)
    arguments = ["doctor", f"--model={tmp_path}", "--length=16", "--thought-tokens=4", "--lookahead=3"]
    assert cli.main([*arguments, "--processes=4", "--sharding=full_shard", "--lora-rank=2", "--anchor-chunk=8"]) == 0
    said = capsys.readouterr().out
    assert "sent by each of 4, in a ring" in said and "gradients summed and cut" in said
    assert cli.main(arguments) == 0
    assert "sent by each" not in capsys.readouterr().out
    assert cli.main([*arguments, "--processes=0"]) == cli.USAGE


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
    """The rows of docs/scaling.md."""
    alone = {
        name: step_memory(AutoConfig.for_model("llama", **shape), ThoughtConfig(), 1, 256, torch.bfloat16)
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


def test_the_table_of_the_docs():
    page = (Path(__file__).parents[3] / "docs/scaling.md").read_text()
    table = page.split("test_step.py -->\n")[1].split("\n<!-- table: end")[0]
    assert table.splitlines() == docs_table()
