"""Save and load: bitwise the same loss, and nothing damaged or foreign gets in."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import quietstar
from quietstar.checkpoints import native as checkpoint
from quietstar.checkpoints.pretrained import load_model
from tests.quietstar.checkpoints.signing import change, edit, sign
from tests.quietstar.common import step, text, wrap

CONFIG = quietstar.ThoughtConfig(thought_tokens=3, lookahead=2, policy_weight=5.0)


@pytest.fixture
def qs(tiny):
    return wrap(tiny("llama"), spread=0.2, **CONFIG.to_dict())


@pytest.fixture
def saved(qs, tmp_path):
    qs.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


IDS = text(2, 10)


KINDS = [
    ("llama", torch.float32, {"anchors": "gate"}),
    ("gemma2", torch.bfloat16, {}),
    ("gpt2", torch.float32, {"base_model": "ema", "base_model_decay": 0.5, "kl_weight": 0.1, "policy_temperature": 1.0}),
]


@pytest.mark.parametrize("name, dtype, fields", KINDS)
def test_a_reloaded_model_gives_bitwise_the_same_loss(tiny, tmp_path, name, dtype, fields):
    without_dropout = dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0) if name == "gpt2" else {}
    tiny(name, **without_dropout).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    qs = wrap(model, spread=0.2, **CONFIG.to_dict() | fields).train()
    with torch.no_grad():
        for weight in qs.parameters():
            weight.add_(0.01)
    qs.update_base_model()
    qs.save_pretrained(tmp_path / "thinking")
    again = quietstar.QuietStar.from_pretrained(tmp_path / "thinking").train()
    assert again.thought_config == qs.thought_config
    (first, got), (second, want) = step(qs, IDS, seed=4), step(again, IDS, seed=4)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert all(map(torch.equal, qs.state_dict().values(), again.state_dict().values()))
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in got)


def test_shards(qs, tmp_path):
    qs.save_pretrained(tmp_path, max_shard_size="50KB", safe_serialization=True)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = quietstar.QuietStar.from_pretrained(tmp_path)
    assert all(map(torch.equal, qs.state_dict().values(), again.state_dict().values()))
    with pytest.raises(ValueError, match="max_shard_size must be bytes, or text such as 5GB, got 'all'"):
        qs.save_pretrained(tmp_path, max_shard_size="all")
    with pytest.raises(ValueError, match="safe_serialization must be True"):
        qs.save_pretrained(tmp_path, safe_serialization=False)


def test_the_base_model_loads_alone(saved, tiny):
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(model(input_ids=IDS).logits, tiny("llama")(input_ids=IDS).logits)
    assert "limits" in (saved / "README.md").read_text().lower()


def test_a_failed_save_leaves_the_old_checkpoint(qs, saved, monkeypatch):
    want = quietstar.QuietStar.from_pretrained(saved)(IDS, seed=1).loss

    def fails(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fails)
    with torch.no_grad():
        qs.model.lm_head.weight.zero_()
    with pytest.raises(OSError, match="No space"):
        qs.save_pretrained(saved)
    assert torch.equal(quietstar.QuietStar.from_pretrained(saved)(IDS, seed=1).loss, want)
    assert os.listdir(saved.parent) == ["model"]


def flip(file):
    content = file.read_bytes()
    file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])


PARTS, WEIGHTS = "quietstar.safetensors", "model.safetensors"
# A file, what becomes of it, whether its hash fits then, and what is said.
DAMAGED = {
    "a flipped bit of weights": (WEIGHTS, flip, False, f"{WEIGHTS} is damaged: it is not the file that was saved"),
    "of thought parts": (PARTS, flip, False, f"{PARTS} is damaged: it is not the file that was saved"),
    "of the config": ("config.json", flip, False, "config.json is damaged: it is not the file that was saved"),
    "another type": ("quietstar.json", lambda file: edit(file, thought_config={"thoughts": "x"}), True, "must be an integer"),
    "another format": ("quietstar.json", lambda file: edit(file, format=99), False, "format 99"),
    "another vocabulary": ("config.json", lambda file: edit(file, vocab_size=60), True, "61 tokens, its config.json says 60"),
    "a tensor is missing": (
        WEIGHTS,
        lambda file: change(file, **{"model.norm.weight": lambda x: None}),
        True,
        "its weights lack model.norm.weight of a LlamaForCausalLM",
    ),
    "parts of another model": (PARTS, lambda file: change(file, start_embedding=lambda x: x[:32]), True, "must have shape"),
    "integers": (
        PARTS,
        lambda file: change(file, start_embedding=torch.Tensor.long),
        True,
        "must hold floats, got torch.int64",
    ),
    "infinity": (PARTS, lambda file: change(file, start_embedding=lambda x: x / 0), True, "has values that are not finite"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(saved, case):
    name, damage, signed, says = DAMAGED[case]
    damage(saved / name)
    if signed:
        sign(saved)
    with pytest.raises(ValueError, match=f"{saved}: .*{says}"):
        quietstar.QuietStar.from_pretrained(saved)


def test_settings_that_were_edited_load_without_verification_alone(saved):
    settings = json.loads((saved / "quietstar.json").read_text())
    settings["thought_config"]["thought_tokens"] = 5
    (saved / "quietstar.json").write_text(json.dumps(settings))
    edit(saved / "config.json", rope_theta=5e5)
    with pytest.raises(ValueError, match="quietstar.json is damaged: it is not what was saved"):
        quietstar.QuietStar.from_pretrained(saved)
    assert quietstar.QuietStar.from_pretrained(saved, verify=False).thought_config.thought_tokens == 5


def test_texts_beside_the_weights_may_be_edited(saved, qs):
    (saved / "README.md").write_text("mine")
    (saved / "generation_config.json").write_text('{"max_new_tokens": 7}')
    assert torch.equal(quietstar.QuietStar.from_pretrained(saved)(IDS, seed=1).loss, qs(IDS, seed=1).loss)


def test_hashes_are_of_every_file_that_numbers_depend_on(tiny, tmp_path, byte_tokenizer):
    quietstar.QuietStar(tiny("llama", vocab_size=257), CONFIG, byte_tokenizer).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "quietstar.json").read_text())
    assert settings["sha256"].keys() == settings["files"].keys()
    assert settings["sha256"].keys() == {"config.json", "model.safetensors", "quietstar.safetensors", "tokenizer.json"}


def test_thought_parts_of_another_dtype_are_converted_with_a_warning(saved, qs):
    change(saved / PARTS, start_embedding=torch.Tensor.double)
    sign(saved)
    with pytest.warns(UserWarning, match="start_embedding is torch.float64, converted to torch.float32"):
        assert torch.equal(quietstar.QuietStar.from_pretrained(saved).start_embedding, qs.start_embedding)


@pytest.mark.parametrize("name", ["../x.safetensors", "/dev/zero", "..", ""])
def test_files_of_other_folders_are_not_read(saved, name):
    """Whether quietstar.json names them, or the index of the weights."""
    settings = json.loads((saved / "quietstar.json").read_text())
    (saved / "quietstar.json").write_text(json.dumps({**settings, "files": {name: 0}}))
    with pytest.raises(ValueError, match=f"quietstar.json must name files of its own folder, got '{name}'"):
        quietstar.QuietStar.from_pretrained(saved)
    names = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").rename(saved.parent / "x.safetensors")
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    with pytest.raises(ValueError, match=f"index.json must name files of its own folder, got '{name}'"):
        load_model(saved)


def test_a_run_does_not_go_on_with_another_vocabulary(saved, tiny):
    qs = quietstar.QuietStar(tiny("llama", vocab_size=70), CONFIG)
    with pytest.raises(ValueError, match="it has a vocabulary of 61 tokens, the model one of 70"):
        checkpoint.restore_all(qs.contents(), saved)
