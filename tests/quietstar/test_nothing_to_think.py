"""Texts, chunks, batches and data sets in which no position thinks."""

import pytest
import torch

from quietstar import QuietStar, ThoughtConfig
from quietstar.cli.main import main
from quietstar.testing import byte_tokenizer, tiny_model
from tests.quietstar.common import gradients

L = 24
ANCHORS = {
    "text": [[3, 5], [-1, -1]],
    "chunk": [[3, 5, -1, -1], [4, -1, -1, -1]],
    "batch": [[-1, -1], [-1, -1]],
    "places": [[], []],
    "last": [[L - 1], [L - 1]],
}


def thinker(preset, **fields):
    torch.manual_seed(0)
    config = ThoughtConfig(preset=preset, thoughts=2, thought_tokens=4, **fields)
    return QuietStar(tiny_model(256), config, byte_tokenizer(), verify=False).train()


def texts(B=2):
    return torch.randint(33, 90, (B, L), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("preset, chunk", [("official", None), ("official", 2), ("rlp", None), ("rlp", 2), ("rpt", None)])
def test_step(preset, chunk):
    qs, ids = thinker(preset), texts()
    qs.anchor_chunk = chunk
    for name, anchors in ANCHORS.items():
        for more in ({}, {"labels": torch.full_like(ids, -100)})[: 2 if name == "text" else 1]:
            qs.zero_grad()
            out = qs(ids, anchors=torch.tensor(anchors, dtype=torch.int64), seed=0, **more)
            out.loss.backward()
            assert out.loss.isfinite() and all(x.isfinite().all() for x in gradients(qs).values()), name
            nothing = more or (qs.thought_config.base_weight == 0 and name in ("batch", "places", "last"))
            if nothing:
                assert out.loss == 0 and not any(x.any() for x in gradients(qs).values()), name
        assert qs.think(ids, anchors=torch.tensor(anchors, dtype=torch.int64), seed=0).thought_ids.shape[1] == len(anchors[0])


@pytest.mark.parametrize("preset", ["official", "rlp"])
def test_a_text_counts_as_it_does_alone(preset):
    """Loss and gradients of a text do not change beside one that doesn't think."""
    qs, ids, found = thinker(preset, base_weight=0.0), texts(), []
    for B in (1, 2):
        qs.zero_grad()
        given = torch.randint(33, 90, (2, 2, 2, 4), generator=torch.Generator().manual_seed(1))[:B]
        out = qs(ids[:B], anchors=torch.tensor(ANCHORS["text"])[:B], thought_ids=given)
        out.loss.backward()
        found.append((out.loss.detach(), gradients(qs)))
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_chunks_in_which_no_text_thinks(seed):
    """Parts of a step have as many places as the one with the most, so that a short text leaves whole chunks without a thought:
    random numbers of anchors and thoughts of no token, in chunks of every size."""
    qs, generator = thinker(("rlp", "grlp")[seed % 2]), torch.Generator().manual_seed(seed)
    B, P, N, T = 1 + seed % 3, 5, 2, 4
    anchors = torch.full((B, P), -1)
    for row in anchors:
        used = int(torch.randint(P + 1, (), generator=generator))
        row[:used] = torch.randperm(L - 1, generator=generator)[:used].sort().values
    given = {"thought_ids": torch.randint(33, 90, (B, P, N, T), generator=generator), "anchors": anchors}
    given["thought_lengths"] = torch.randint(T + 1, (B, P, N), generator=generator)
    want = None
    for chunk in (None, 1, 2, 3, 4):
        qs.anchor_chunk = chunk
        qs.zero_grad()
        loss = qs(texts(B), **given).loss
        loss.backward()
        got = {"loss": loss.detach(), **gradients(qs)}
        want = want or got
        assert got.keys() == want.keys()
        for name, x in want.items():
            torch.testing.assert_close(got[name], x, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("preset", ["rpt", pytest.param("rlp", marks=pytest.mark.long)])
def test_commands(preset, tmp_path):
    """Untrained thoughts match nothing, and no text has the end of a sentence within it."""
    model, data = tmp_path / "model", tmp_path / "text.txt"
    tiny_model(256).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    data.write_text("one two three four.\n" * 8)
    where = ["--anchors=sentences"] if preset == "rlp" else ["--anchor-count=2"]
    options = ["--no-pack", "--length=24", "--held-out=2", "--steps=2", "--batch-size=2", "--thoughts=2", "--thought-tokens=8"]
    out = tmp_path / "run"
    assert main(["train", "--preset", preset, f"--model={model}", f"--data={data}", f"--out={out}", *options, *where]) == 0
