"""Checkpoints of adapters: they hold no base, load bitwise, and load only on their own base; runs that train adapters."""

import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

import quietstar
from quietstar.checkpoints import native as checkpoint
from quietstar.checkpoints import places
from quietstar.checkpoints.pretrained import load_model
from quietstar.cli import main as cli
from quietstar.hf import adapters

pytest.importorskip("peft")
from tests.quietstar.checkpoints.signing import sign
from tests.quietstar.common import short_run, texts_of
from tests.quietstar.hf.lora_models import CONFIG, IDS, RANK, gradients, lora, wrap


@pytest.fixture
def qs(base):
    return wrap(AutoModelForCausalLM.from_pretrained(base))


@pytest.fixture
def saved(qs, tmp_path):
    qs.save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters"


def test_a_checkpoint_holds_adapters_alone_and_loads_bitwise(qs, saved, base):
    assert sorted(os.listdir(saved)) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "quietstar.json",
        "quietstar.safetensors",
    ]
    trained = sum(weight.nbytes for name, weight in qs.named_parameters() if "lora_" in name)
    assert trained < (saved / "adapter_model.safetensors").stat().st_size < trained + 4096
    assert str(base) in (saved / "README.md").read_text()
    again = quietstar.QuietStar.from_pretrained(saved)
    first, second = gradients(qs), gradients(again)
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    assert first[1].keys() == second[1].keys()
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_adapters_load_onto_a_base_at_hand_and_in_another_dtype(qs, saved, base, tiny):
    want = qs(IDS, seed=4)
    got = quietstar.QuietStar.from_pretrained(saved, base=tiny("llama"))(IDS, seed=4)
    assert torch.equal(got.loss, want.loss)
    for dtype in (torch.bfloat16, torch.float16):
        half = quietstar.QuietStar.from_pretrained(saved, base=str(base), dtype=dtype)
        out = half(IDS, thought_ids=want.thought_ids)
        assert half.model.dtype == dtype and (out.nll_mix - want.nll_mix).abs().max() < 0.15


def test_adapters_of_another_base_are_refused(saved, tiny, tmp_path):
    with pytest.raises(ValueError, match="belong to another base: the weights of LlamaForCausalLM have other values"):
        quietstar.QuietStar.from_pretrained(saved, base=tiny("llama", seed=1))
    with pytest.raises(ValueError, match="belong to another base: the layers of LlamaForCausalLM have other names or shapes"):
        quietstar.QuietStar.from_pretrained(saved, base=tiny("llama", num_hidden_layers=1))
    with pytest.raises(ValueError, match="belong to another base: the layers of GPT2LMHeadModel"):
        quietstar.QuietStar.from_pretrained(saved, base=tiny("gpt2"))
    with pytest.raises(ValueError, match=r"base .*nowhere does not load \(base= takes another\)"):
        quietstar.QuietStar.from_pretrained(saved, base=str(tmp_path / "nowhere"))
    fine_tuned = tiny("llama")
    with torch.no_grad():
        for weight in fine_tuned.parameters():
            weight.mul_(1.002)
    with pytest.raises(ValueError, match="have other values"):
        quietstar.QuietStar.from_pretrained(saved, base=fine_tuned)
    assert not adapters.there(fine_tuned)


def test_files_of_other_adapters_are_refused(saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    sign(saved)
    with pytest.raises(ValueError, match="adapter_model.safetensors and adapter_config.json belong to different adapters"):
        quietstar.QuietStar.from_pretrained(saved)


def test_pickled_adapters_are_not_read(saved):
    weights = saved / "adapter_model.safetensors"
    weights.rename(saved / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.safetensors is missing"):
        quietstar.QuietStar.from_pretrained(saved)
    with pytest.raises(ValueError, match="it holds adapters, which need their base"):
        load_model(saved, allow_bin=True)


DATA = texts_of([7 + i % 3 for i in range(5)])


def train_some(base, out, resume=None, rank=RANK, whole=False):
    torch.manual_seed(0)
    qs = quietstar.QuietStar(AutoModelForCausalLM.from_pretrained(base), CONFIG)
    if not whole:
        qs.add_adapters(lora(r=rank, lora_dropout=0.2))
    return qs, short_run(qs, DATA, out, resume)


@pytest.mark.long
def test_a_resumed_run_gives_the_losses_of_an_unbroken_one_bitwise(base, tmp_path):
    qs, unbroken = train_some(base, tmp_path / "run")
    began = AutoModelForCausalLM.from_pretrained(base).state_dict()
    frozen = adapters._base_matrices(qs.model)
    assert set(frozen) < set(began) and all(torch.equal(weight, began[name]) for name, weight in frozen.items())
    newest, half_way = places.folder(tmp_path / "run", 4), places.folder(tmp_path / "run", 2)
    assert not (newest / "model.safetensors").exists()
    assert "adapter_model.safetensors" in json.loads((newest / "manifest.json").read_text())
    again, resumed = train_some(base, tmp_path / "run", resume=half_way)
    assert resumed == unbroken
    assert all(torch.equal(a, b) for a, b in zip(qs.parameters(), again.parameters(), strict=True))
    loaded = quietstar.QuietStar.from_pretrained(newest)
    assert torch.equal(loaded.eval()(IDS).loss, qs.eval()(IDS).loss)


@pytest.mark.long
def test_a_run_does_not_continue_with_other_adapters(base, tiny, tmp_path):
    train_some(base, tmp_path / "run")
    with pytest.raises(ValueError, match="its adapters were made with r=3, not 2"):
        train_some(base, tmp_path / "run", resume="auto", rank=2)
    with pytest.raises(ValueError, match="it holds adapters alone, and this run trains a whole model"):
        train_some(base, tmp_path / "run", resume="auto", whole=True)
    tiny("llama", seed=5).save_pretrained(tmp_path / "another")
    with pytest.raises(ValueError, match="belong to another base: the weights of"):
        train_some(tmp_path / "another", tmp_path / "run", resume="auto")
    qs, _ = train_some(base, tmp_path / "whole", whole=True)
    qs.add_adapters(lora())
    with pytest.raises(ValueError, match="it holds a whole model, and this run trains adapters alone"):
        checkpoint.restore_all(qs.contents(), places.folder(tmp_path / "whole", 4))


@pytest.mark.long
def test_the_command_line(tiny, base, byte_tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    byte_tokenizer.save_pretrained(base)
    tiny("llama", vocab_size=257).save_pretrained(base)
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {i} has a few words." for i in range(20)))
    small = ["--data=text.txt", "--length=16", "--steps=2", "--batch-size=2", "--thoughts=2", "--thought-tokens=2"]
    small += ["--lookahead=2", "--held-out=0"]
    options = ["train", "--model=base", "--out=run", "--lora-rank=2", "--lora-targets=q_proj,v_proj", *small]
    assert cli.main(options) == 0
    assert not list((tmp_path / "run").rglob("model.safetensors"))
    assert cli.main([*options, "--resume", "--lora-rank=3"]) == cli.DATA
    assert "has lora_rank=2, not 3" in capsys.readouterr().err
    compiled = []
    monkeypatch.setattr(quietstar.QuietStar, "compile", lambda qs: compiled.append(qs))
    more = ["train", "--model=run", "--out=more", "--compile", "--gradient-checkpointing", "--optimizer=fused", *small]
    assert cli.main(more) == 0
    assert len(compiled) == 1 and adapters.there(compiled[0].model)
    assert cli.main(["train", "--model=run", "--out=else", "--lora-rank=2", *small]) == cli.DATA
    assert "already has adapters" in capsys.readouterr().err
