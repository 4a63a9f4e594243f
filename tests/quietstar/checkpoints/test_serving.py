"""Folders that servers and other libraries take: their choice of files, tried on what is written here."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from quietstar import QuietStar, ThoughtConfig
from quietstar.cli.main import main
from quietstar.testing import byte_tokenizer, tiny_model
from quietstar_recipes.common.models import small_model
from quietstar_recipes.common.saving import save_model
from quietstar_recipes.tasks import Addition


def of_vllm(folder):
    """DefaultModelLoader and filter_duplicate_safetensors_files of vLLM, which SGLang has too."""
    files, index = sorted(Path(folder).glob("*.safetensors")), Path(folder) / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text())["weight_map"].values())
        files = [file for file in files if file.name in named]
    return files


def of_mlx(folder):
    return sorted(Path(folder).glob("model*.safetensors"))


def of_llama_cpp(folder):
    """ModelBase.get_model_part_names, and index_tensors, which compares with the index where there is one."""
    files, index = sorted(Path(folder).glob("model*.safetensors")), Path(folder) / "model.safetensors.index.json"
    if index.is_file():
        assert set(json.loads(index.read_text())["weight_map"]) == names_in(files)
    return files


def names_in(files):
    return {name for file in files for name in safe_open(file, "pt").keys()}  # noqa: SIM118


def check(folder, model, tied=()):
    """Every loader finds the plain model's weights and nothing else."""
    wanted = set(model.state_dict()) - set(tied)
    for files in (of_vllm, of_mlx, of_llama_cpp):
        assert names_in(files(folder)) == wanted, files.__name__
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight)
    rope = getattr(model.config, "rope_parameters", {"rope_theta": None})
    assert json.loads((Path(folder) / "config.json").read_text()).get("rope_theta") == rope["rope_theta"]
    tokenizer = json.loads((Path(folder) / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in tokenizer


def thinker(tied=False):
    torch.manual_seed(0)
    model = tiny_model(256)
    if tied:
        model.config.tie_word_embeddings = True
        model = LlamaForCausalLM(model.config)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return QuietStar(model, ThoughtConfig(thoughts=2, thought_tokens=2, lookahead=2), tokenizer, verify=False)


@pytest.mark.parametrize("tied", [False, True])
def test_save_pretrained(tied, tmp_path):
    qs = thinker(tied)
    qs.save_pretrained(tmp_path / "own")
    check(tmp_path / "own", qs.model, ["lm_head.weight"] * tied)
    (tmp_path / "own" / "model.safetensors.index.json").unlink()  # as in older checkpoints
    assert QuietStar.from_pretrained(tmp_path / "own").thought_config == qs.thought_config


def test_a_result_of_a_recipe(tmp_path):
    task = Addition(1)
    model = small_model(task, width=32, heads=2, positions=64)
    save_model(tmp_path / "result", model, task, {})
    check(tmp_path / "result", model, ["lm_head.weight"] * bool(model.config.tie_word_embeddings))


def test_a_run_and_its_merged_adapters(tmp_path, monkeypatch, capsys):
    qs = thinker()
    base = tmp_path / "base"
    qs.model.save_pretrained(base)
    qs.tokenizer.save_pretrained(base)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n\n".join(f"Paragraph {i} has a few words." for i in range(40)))
    options = ["--data=text.txt", "--length=16", "--steps=1", "--batch-size=2", "--thoughts=2", "--thought-tokens=2"]
    options += ["--lookahead=2", "--held-out=0", "--learning-rate=1e-2"]
    assert main(["train", "--model=base", "--out=whole", *options]) == 0
    (step,) = Path("whole/checkpoints").glob("step-*")
    assert (step / "optimizer.safetensors").exists()
    check(step, QuietStar.from_pretrained(step).model)
    assert main(["train", "--model=base", "--out=lora", "--lora-rank=2", *options]) == 0
    for run in ("whole", "lora"):
        assert main(["merge", f"--model={run}", f"--out=plain-{run}"]) == 0
        own = QuietStar.from_pretrained(run)
        if own.base:
            own.merge_adapters()
        check(f"plain-{run}", own.model)
        names = {file.name for file in Path(f"plain-{run}").iterdir()}
        assert not any("quietstar" in name or "adapter" in name for name in names)
        assert AutoTokenizer.from_pretrained(f"plain-{run}").chat_template == qs.tokenizer.chat_template
    capsys.readouterr()
    assert main(["merge", "--model=lora", "--out=plain-lora"]) == 2
    assert "--out must be a new folder, and plain-lora exists" in capsys.readouterr().err
