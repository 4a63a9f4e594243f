"""One packed pass over recorded thoughts reproduces the published code's loss, its parts and every gradient."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import MistralConfig, MistralForCausalLM

import quietstar

RECORDS = sorted((Path(__file__).parent.parent / "golden").glob("*.safetensors"))
LOSS_BOUND, GRADIENT_BOUND = 1e-4, 1e-3  # tests/golden/README.md


def read(path):
    with safe_open(path, "pt") as record:
        meta = {key: json.loads(value) for key, value in record.metadata().items()}
        return meta, {key: record.get_tensor(key) for key in record.keys()}  # noqa: SIM118


def wrap(meta, tensors, policy_weight):
    fields = {"thoughts": meta["N"], "thought_tokens": meta["T"], "lookahead": meta["K"], "policy_weight": policy_weight}
    fields |= {name: meta[name] for name in ("start_token_id", "end_token_id")}
    config = quietstar.ThoughtConfig(preset="official", policy_temperature=meta["reinforce_temperature"], **fields)
    qs = quietstar.QuietStar(MistralForCausalLM(MistralConfig(**meta["config"])), config)
    state = {key.removeprefix("weights."): x for key, x in tensors.items() if key.startswith("weights.")}
    state |= {name: tensors[f"raw.{name}"] for name in ("start_embedding", "end_embedding")}
    qs.load_official_state_dict(state, embedding_scale=meta["embedding_scale"])
    return qs


def run(qs, tensors):
    labels = tensors["labels"].masked_fill(tensors["attention_mask"] == 0, -100)
    return qs(tensors["input_ids"], tensors["attention_mask"], labels, thought_ids=tensors["thought_ids"])


def published_name(name):
    return name.removeprefix("model.").replace("mixing_head.", "talk_head.0.", 1)


def relative(got, want):
    return float((got.detach() - want).norm() / want.norm())


SMALLEST = min(RECORDS, key=lambda path: path.stat().st_size)
ON_GPU = torch.cuda.is_available()


@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=() if ON_GPU else pytest.mark.kernels)])
@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
@pytest.mark.parametrize("grads", ["grads", "grads_ce"])
def test_record(path, grads, backend, monkeypatch):
    if backend == "triton" and not ON_GPU and (path != SMALLEST or grads != "grads"):
        pytest.skip("one record takes Triton's interpreter long enough")
    monkeypatch.setenv("QUIETSTAR_BACKEND", backend)
    device = "cuda" if ON_GPU and backend != "cpu" else "cpu"
    meta, tensors = read(path)
    tensors = {name: x.to(device) for name, x in tensors.items()}
    qs = wrap(meta, tensors, policy_weight=meta["policy_loss_beta"] if grads == "grads" else 0.0).to(device)
    out = run(qs, tensors)

    assert relative(out.loss, tensors["loss" if grads == "grads" else "loss_ce"]) <= LOSS_BOUND
    assert relative(out.loss_ce, tensors["loss_ce"]) <= LOSS_BOUND
    assert relative(out.policy_loss, tensors["policy_loss"]) <= LOSS_BOUND
    rewarded = tensors["reward"].shape[-1]
    assert relative(out.reward[:, :rewarded].transpose(1, 2), tensors["reward"]) <= LOSS_BOUND
    assert relative(out.advantage[:, :rewarded].transpose(1, 2), tensors["advantage"]) <= LOSS_BOUND
    assert not out.reward[:, rewarded:].any()
    assert relative(out.nll_base, tensors["ce_base_tokens"][:, 0]) <= LOSS_BOUND
    for j in range(meta["K"]):
        want = tensors[f"ce_mix_tokens.{j}"]
        assert relative(out.nll_mix[:, : want.shape[-1], :, j].transpose(1, 2), want) <= LOSS_BOUND
    lengths = torch.tensor(meta["lengths"], device=device)
    last = torch.arange(meta["L"], device=device)[None, :, None] + torch.arange(meta["K"], device=device)
    inside = (last < lengths[:, None, None])[:, :, None].expand_as(out.weight)
    assert relative(out.weight[inside], tensors["mix_weight"].permute(0, 3, 1, 2)[inside]) <= LOSS_BOUND

    out.loss.backward()
    for name, parameter in qs.named_parameters():
        want = tensors[f"{grads}.{published_name(name)}"]
        want = want[0] if name.endswith("_embedding") else want
        assert relative(parameter.grad, want) <= GRADIENT_BOUND, name
