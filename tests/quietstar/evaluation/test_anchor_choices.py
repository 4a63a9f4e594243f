"""The gain from thoughts for each anchor choice, against sums over each text by itself."""

import math
from dataclasses import replace

import pytest
import torch

from quietstar.evaluation.difficulty import anchor_text, by_anchor_choice
from quietstar.evaluation.losses import summary, token_losses
from tests.quietstar.common import texts_of, wrap

LENGTHS = (9, 14, 7, 14, 5)
TEXTS = texts_of(LENGTHS)
FIELDS = {"thoughts": 2, "thought_tokens": 2, "lookahead": 2, "anchor_share": 0.3, "anchor_stride": 3}


@torch.no_grad()
def chosen(qs, policy):
    """Positions in each text, by hand."""
    found = []
    for ids in (x["input_ids"] for x in TEXTS):
        places = torch.arange(len(ids) - 1)
        if policy == "every":
            places = places[2::3]
        elif policy == "entropy":
            p = qs.model(ids[None]).logits[0, :-1].softmax(-1)
            order = (-p * p.log()).sum(-1).argsort(descending=True)
            places = order[: math.ceil(0.3 * len(places))].sort().values
        elif policy == "gate":
            hidden = qs.model.model(ids[None]).last_hidden_state[0, :-1]
            places = places[qs.gate(hidden) > 0.5]
        found.append(places)
    return found


def test_counts_and_gains(tiny, batch_size=3):
    qs = wrap(tiny("llama"), spread=0.4, **FIELDS, anchors="gate").eval()
    torch.nn.init.normal_(qs.gate.linear.weight, 0, 0.5, generator=torch.Generator().manual_seed(2))
    losses = token_losses(qs, TEXTS, batch_size)
    rows = {row["anchors"]: row for row in by_anchor_choice(qs, TEXTS, losses, batch_size)}
    assert list(rows) == ["all", "random", "entropy", "every", "gate"]
    total = sum(LENGTHS) - len(LENGTHS)
    for policy in ("all", "entropy", "every", "gate"):
        gains = []
        for i, places in enumerate(chosen(qs, policy)):
            with torch.no_grad():
                out = qs(TEXTS[i]["input_ids"][None])
            gains.append((out.nll_base[0, places] - out.nll_mix[0, places, 0, 0]).double())
        gains = torch.cat(gains)
        assert 0 < len(gains) and (policy == "all") == (len(gains) == total)
        row = rows[policy]
        assert (row["tokens"], row["share"]) == (len(gains), len(gains) / total)
        assert row["gain"] == pytest.approx(float(gains.mean()), abs=1e-5)
        assert row["gain_of_all"] == pytest.approx(float(gains.sum()) / total, abs=1e-5)
        assert row["gain_low"] < row["gain"] < row["gain_high"]
        assert row["gain"] == pytest.approx(row["mixing"] + row["content"], abs=1e-9)
    assert rows["random"]["tokens"] == sum(math.ceil(0.3 * (length - 1)) for length in LENGTHS)
    assert rows["all"]["tokens"] == summary(losses)["tokens"]


def test_a_closed_gate_and_a_missing_one(tiny):
    qs = wrap(tiny("llama"), spread=0.4, **FIELDS, anchors="gate").eval()
    torch.nn.init.constant_(qs.gate.linear.bias, -5)
    losses = token_losses(qs, TEXTS)
    rows = by_anchor_choice(qs, TEXTS, losses)
    assert rows[-1] == {"anchors": "gate", "share": 0, "gain_of_all": 0, "tokens": 0} | dict.fromkeys(
        ("base", "mixed", *(f"{part}{end}" for part in ("gain", "mixing", "content") for end in ("", "_low", "_high")))
    )
    lines = anchor_text(rows).splitlines()
    assert len(lines) == 7 and lines[-1].split() == ["gate", "0%", "+0.0000"]
    assert lines[2].split()[:3] == ["all", "100%", f"{rows[0]['gain']:+.4f}"]
    assert "content" in lines[1] and max(map(len, lines)) <= 80
    alone = anchor_text(by_anchor_choice(qs, TEXTS, replace(losses, another=None))).splitlines()
    assert "content" not in alone[1] and all(line.startswith(some) for line, some in zip(lines[2:], alone[2:], strict=True))
    without = wrap(tiny("llama"), **FIELDS).eval()
    assert [row["anchors"] for row in by_anchor_choice(without, TEXTS, losses)] == ["all", "random", "entropy", "every"]
