"""Published checkpoints: a recorded one loads and saves back tensor for tensor, and nothing else is taken for one."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar import QuietStar, ThoughtConfig, explain
from quietstar.checkpoints import native as checkpoint
from quietstar.checkpoints import official
from quietstar.cli import main as cli
from quietstar.cli.common import load_model
from tests.quietstar.checkpoints.signing import change, edit
from tests.quietstar.test_golden import read

RECORD = Path(__file__).parents[2] / "golden" / "a7k3n2.safetensors"
EMBEDDINGS = ("start_embedding", "end_embedding")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def record():
    return read(RECORD)


@pytest.fixture
def state(record):
    """The recorded weights as the published code stores them."""
    _, tensors = record
    state = {key.removeprefix("weights."): x for key, x in tensors.items() if key.startswith("weights.")}
    return state | {name: tensors[f"raw.{name}"] for name in EMBEDDINGS}


def published_config(meta, **changes):
    """config.json as transformers 4.37 writes it under the published code."""
    ahead = {"max_thoughts": meta["A"] + meta["K"] + 1, "merged_talk_heads": True, "use_weighted_talk_head": True}
    kind = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "torch_dtype": "float32"}
    return {**meta["config"], **kind, **ahead, "transformers_version": "4.37.0.dev0", **changes}


@pytest.fixture
def published(record, state, tmp_path):
    """A folder in the published format, in one file."""
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(published_config(record[0])))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def into_shards(folder, count=3):
    """Cut model.safetensors into shards with an index, tensors dealt out in turn, so that thought parts lie in several."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(count):
        name = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = {key: state[key] for key in sorted(state)[i::count]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_the_loaded_model_has_the_recorded_loss(record, published):
    meta, tensors = record
    qs = QuietStar.from_pretrained(published)
    config = qs.thought_config
    # Positions ahead, as the published code names them; J = 4 is assumed where the checkpoint does not say.
    assert (config.lookahead, config.thought_tokens) == (4, meta["A"] + meta["K"] - 4 - 3)
    ids = {"start_token_id": meta["start_token_id"], "end_token_id": meta["end_token_id"]}
    qs.thought_config = ThoughtConfig(thoughts=meta["N"], thought_tokens=meta["T"], lookahead=meta["K"], **ids)
    labels = tensors["labels"].masked_fill(tensors["attention_mask"] == 0, -100)
    out = qs(tensors["input_ids"], tensors["attention_mask"], labels, thought_ids=tensors["thought_ids"])
    assert out.loss.item() == pytest.approx(float(tensors["loss"]), rel=1e-4)
    assert out.loss_ce.item() == pytest.approx(float(tensors["loss_ce"]), rel=1e-5)


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_round_trip(record, state, published, tmp_path, shards):
    if shards:
        into_shards(published)
    qs = QuietStar.from_pretrained(published)
    qs.save_official(tmp_path / "back", max_shard_size="20KB" if shards else "5GB")
    files = sorted(file.name for file in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2 if shards else files == ["model.safetensors"]
    back = {name: x for file in files for name, x in load_file(tmp_path / "back" / file).items()}
    assert set(back) == set(state)
    for name, want in state.items():
        want = torch.stack([want[0], torch.zeros_like(want[0])]) if name in EMBEDDINGS else want
        assert torch.equal(back[name], want), name
    again = QuietStar.from_pretrained(tmp_path / "back")
    assert again.thought_config == qs.thought_config
    for (name, a), b in zip(qs.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    ids = record[1]["input_ids"]
    assert torch.equal(qs(ids, seed=1).nll_mix, again(ids, seed=1).nll_mix)


def test_what_the_published_code_reads_of_the_config(published, tmp_path):
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    qs = QuietStar.from_pretrained(published)
    qs.thought_config = ThoughtConfig(thoughts=3, thought_tokens=5, lookahead=2)
    qs.save_official(tmp_path / "back")
    saved = json.loads((tmp_path / "back" / "config.json").read_text())
    want = {"model_type": "mistral", "rope_theta": 5000.0, "torch_dtype": "float32", "max_thoughts": 11, "n_ahead": 8}
    want |= {"n_ahead_talk": 2, "n_passes": 3, "use_complex_talk_head": True, "use_concat_talk_head": True}
    assert {name: saved[name] for name in want} == want
    assert {name for name in config if saved[name] != config[name]} <= {
        "transformers_version",
        "max_thoughts",
        "rope_theta",
        "dtype",
    }
    again = QuietStar.from_pretrained(tmp_path / "back")
    assert (again.thought_config.thoughts, again.thought_config.thought_tokens, again.thought_config.lookahead) == (3, 5, 2)
    assert again.config.rope_parameters["rope_theta"] == 5000.0


def test_another_scale_of_the_embeddings(published, state, tmp_path):
    qs = QuietStar.from_pretrained(published)
    qs.thought_config = ThoughtConfig(embedding_scale=4.0)
    with torch.no_grad():
        qs.start_embedding.mul_(25)
        qs.end_embedding.mul_(25)
    qs.save_official(tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    for name in EMBEDDINGS:
        torch.testing.assert_close(back[name][0], state[name][0])
    before = qs.start_embedding.clone()
    qs.load_official_state_dict(back)
    torch.testing.assert_close(qs.start_embedding, before)


def test_half_precision(published, state, tmp_path):
    """Weights stay in their dtype; mixing head and embeddings are fp32 in the wrapper, without a bit lost."""
    half = {name: x.bfloat16() for name, x in state.items()}
    save_file(half, published / "model.safetensors", metadata={"format": "pt"})
    qs = QuietStar.from_pretrained(published, dtype=torch.bfloat16)
    assert qs.model.dtype == torch.bfloat16 and {x.dtype for x in qs.mixing_head.parameters()} == {torch.float32}
    qs.save_official(tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name].bfloat16(), x) for name, x in half.items() if name not in EMBEDDINGS)
    assert all(torch.equal(back[name][0].bfloat16(), half[name][0]) for name in EMBEDDINGS)


def test_thought_tokens_of_the_tokenizer(record, published):
    meta, _ = record
    vocabulary = {f"w{i}": i for i in range(64)}
    del vocabulary[f"w{meta['start_token_id']}"], vocabulary[f"w{meta['end_token_id']}"]
    vocabulary |= {official.START: meta["start_token_id"], official.END: meta["end_token_id"]}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(published)
    qs = QuietStar.from_pretrained(published)
    assert qs.thought_config.banned == [meta["start_token_id"], meta["end_token_id"]]
    assert len(explain(qs, "w5 w6 w7 w8").tokens) == 4


def test_saving_over_a_checkpoint_of_ours(published):
    """No file of the old format or of further shards remains, which would be read instead."""
    qs = QuietStar.from_pretrained(published)
    qs.save_pretrained(published)
    qs.save_official(published, max_shard_size="20KB")
    assert not (published / "quietstar.json").exists() and (published / "model.safetensors.index.json").exists()
    with torch.no_grad():
        qs.model.lm_head.weight.add_(1)
    qs.save_official(published)
    assert not (published / "model.safetensors.index.json").exists()
    assert torch.equal(QuietStar.from_pretrained(published).model.lm_head.weight, qs.model.lm_head.weight)
    assert os.listdir(published.parent) == ["published"]


@pytest.mark.parametrize("preset, name", [("paper", "mistral"), ("official", "llama")])
def test_what_the_published_code_does_not_know(tiny, tmp_path, preset, name):
    qs = QuietStar(tiny(name), ThoughtConfig(preset=preset), verify=False)
    with pytest.raises(ValueError, match="mixes logits|Mistral models alone, this is a llama"):
        qs.save_official(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_takes_it(record, published, capsys):
    model = load_model(str(published), ThoughtConfig(thought_tokens=3), None, "float32")
    assert torch.equal(model.start_embedding.detach(), record[1]["raw.start_embedding"][0])
    assert model.thought_config.thought_tokens == 3
    assert checkpoint.thinks(published)
    (published / "model.safetensors").write_bytes((published / "model.safetensors").read_bytes()[:1000])
    capsys.readouterr()
    assert cli.main(["think", f"--model={published}", "Hello"]) == cli.DATA
    assert len(capsys.readouterr().err.splitlines()) == 1


def without_a_shard(folder):
    into_shards(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


BAD = {
    "no end embedding": (lambda folder: change(folder / WEIGHTS, end_embedding=lambda _: None), "missing end_embedding"),
    "an unknown tensor": (
        lambda folder: change(folder / WEIGHTS, **{"extra.weight": lambda _: torch.zeros(2)}),
        "unknown extra.weight",
    ),
    "another vocabulary": (
        lambda folder: edit(folder / "config.json", vocab_size=60),
        "its weights have a vocabulary of 64 tokens, its config.json says 60",
    ),
    "a shard is missing": (without_a_shard, "model-00002-of-00003.safetensors is missing"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no model.safetensors there"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_refused_in_one_sentence(published, case):
    spoil, message = BAD[case]
    spoil(published)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        QuietStar.from_pretrained(published)
    assert str(published) in str(caught.value) and "\n" not in str(caught.value)


class Trap:
    """What a pickle can do: run a function when it is read."""

    def __reduce__(self):
        return (os.mkdir, ("trapped",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_not_opened_and_convert_as_told(record, state, published, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    file = published / name
    torch.save({**state, "trap": Trap()}, file)
    (published / "model.safetensors").unlink()
    for path in (published, file):
        with pytest.raises(ValueError, match="pickle files") as caught:
            QuietStar.from_pretrained(path)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "trapped").exists()

    torch.save(state, file)
    code = str(caught.value).partition("convert them with ")[2].replace("'model.safetensors'", "target")
    exec(f"import safetensors.torch\n{code}", {"torch": torch, "file": file, "target": published / "model.safetensors"})
    qs = QuietStar.from_pretrained(published)
    assert torch.equal(qs.start_embedding.detach(), state["start_embedding"][0])
