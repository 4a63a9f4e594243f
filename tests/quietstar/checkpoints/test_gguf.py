"""Language models in GGUF files: wherever a model is named, trained and saved; each way to go wrong is a sentence."""

import importlib
import json

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from quietstar import QuietStar, ThoughtConfig
from quietstar.checkpoints.pretrained import load_config, load_model, load_tokenizer
from quietstar.cli import main as cli
from quietstar.group_rl.shared_prompt import SharedPrompts

THOUGHTS = ["--thoughts=1", "--thought-tokens=1", "--lookahead=1"]


def write_gguf(path, model, **changed):
    """A Llama model with a token for each byte and one for "ab", unquantized; q and k aren't in GGUF's order."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    tokens = [*bytes_to_unicode().values(), "ab", "<|end|>"]
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(changed.get("layers", config.num_hidden_layers))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(257)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama", vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=1)


@pytest.fixture
def file(model, tmp_path):
    path = tmp_path / "models" / "tiny.gguf"
    path.parent.mkdir()
    write_gguf(path, model)
    return path


def test_a_run_from_a_gguf_file(file, tmp_path, monkeypatch, capsys):
    """Its adapters find the file again, from another folder."""
    monkeypatch.chdir(file.parent)
    (tmp_path / "text.txt").write_text("Some words to train on. " * 20)
    typed = ["train", "--model=tiny.gguf", f"--data={tmp_path / 'text.txt'}", "--length=16", "--held-out=0", "--steps=1"]
    assert cli.main([*typed, *THOUGHTS, "--batch-size=2", "--lora-rank=2", f"--out={tmp_path / 'run'}"]) == 0
    monkeypatch.chdir(tmp_path)
    assert cli.main(["think", "--model=run", "--at=2", "Some words"]) == 0
    assert "'m'" in capsys.readouterr().out


def test_a_model_that_transformers_unpacked_is_saved(file, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    QuietStar(loaded, ThoughtConfig(thoughts=1, thought_tokens=1, lookahead=1)).save_pretrained(tmp_path / "saved")
    ours, saved = load_model(file), load_model(tmp_path / "saved")
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), saved.parameters(), strict=True))
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert load_tokenizer(file)("é!")["input_ids"] == [*"é!".encode().translate(_token_ids())]


@pytest.mark.parametrize("shared", [False, True])
def test_trl_trains_it(file, tmp_path, shared):
    """TRL's trainer what ``load_model`` returns; one with shared prompts also what transformers does."""
    trl, datasets = pytest.importorskip("trl", minversion="1.16"), pytest.importorskip("datasets")
    kind = type("Trainer", (SharedPrompts, trl.GRPOTrainer) if shared else (trl.GRPOTrainer,), {})
    options = {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 2, "max_steps": 1}
    quiet = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name) if shared else load_model(file)
    trainer = kind(
        loaded,
        lambda completion_ids, **_: [float(sum(ids)) for ids in completion_ids],
        trl.GRPOConfig(str(tmp_path), **options, **quiet),
        datasets.Dataset.from_list([{"prompt": "ab"}] * 2),
        processing_class=load_tokenizer(file),
    )
    before = [weight.clone() for weight in loaded.parameters()]
    assert trainer.train().global_step == 1
    assert not all(map(torch.equal, loaded.parameters(), before))


def _token_ids():
    """The token of each byte: GGUF has them in the order of GPT-2's table."""
    order = list(bytes_to_unicode())
    return bytes(order.index(byte) for byte in range(256))


def test_what_is_refused(file, model, monkeypatch):
    with pytest.raises(ValueError, match=r"name the file, .*tiny\.gguf"):
        load_config(file.parent)
    with pytest.raises(ValueError, match=r"quietstar train --model .*tiny\.gguf"):
        QuietStar.from_pretrained(file)
    with pytest.raises(ValueError, match="there is no such file"):
        load_config(file.parent / "other.gguf")
    write_gguf(file, model, layers=1000)
    with pytest.raises(ValueError, match="its config says 1000 layers, its weights are 12 tensors"):
        load_model(file)
    monkeypatch.setattr(importlib.import_module("transformers.modeling_gguf_pytorch_utils"), "is_gguf_available", lambda: False)
    with pytest.raises(ValueError, match="pip install gguf"):
        load_config(file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot load a config from this file"):
        load_config(file)
