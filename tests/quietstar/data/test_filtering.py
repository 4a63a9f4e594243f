"""The kept thoughts are those that a loop over all of them picks, and training takes them."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch

from quietstar.cli import main as cli
from quietstar.data.filtering import ThoughtFilter, best
from quietstar.data.thoughts import OfflineThoughts, export_thoughts
from quietstar.run.batches import collate
from quietstar.thinking.rollout import Thoughts
from tests.quietstar.common import short_run, texts_of, wrap

N, T, J = 4, 6, 2
CONFIG = {"thoughts": N, "thought_tokens": T, "lookahead": J, "policy_weight": 5.0, "embedding_scale": 1.0}


def thinking(tiny, **changes):
    return wrap(tiny("llama"), spread=0.3, **CONFIG | changes)


def plain():
    return texts_of((10, 7))


def documents():
    ids = torch.tensor([0] * 7 + [1] * 5)
    return [{"input_ids": x["input_ids"], "document_ids": ids} for x in texts_of((12, 12))]


def labelled():
    return [x | {"labels": torch.where(torch.arange(len(x["input_ids"])) < 4, -100, x["input_ids"])} for x in plain()]


def at_places():
    return [x | {"anchors": torch.tensor([1, 2, 4][: 1 + i])} for i, x in enumerate(plain())]


def sample(batch, P):
    """Random thoughts of random lengths; the first at each anchor begins with the text's next tokens."""
    generator = torch.Generator().manual_seed(2)
    ids, B = batch["input_ids"], len(batch["input_ids"])
    thoughts = torch.randint(3, 61, (B, P, N, T), generator=generator)
    anchors = batch.get("anchors", torch.arange(P).expand(B, P))
    places = (anchors[:, :, None] + 1 + torch.arange(4)).clamp(max=ids.shape[1] - 1)
    thoughts[:, :, 0, :4] = ids[torch.arange(B)[:, None, None], places]
    lengths = torch.randint(T + 1, (B, P, N), generator=generator)
    lengths[:, ::2, 0] = 5
    return Thoughts(thoughts, -torch.rand(B, P, N, T, generator=generator), lengths)


@torch.no_grad()
def picked(qs, example, thoughts, wanted):
    """(anchor, ids, log-probabilities), and the gains, of the thoughts of a text that a loop keeps; each is scored alone."""
    columns = {name: x[None] for name, x in example.items() if name in ("input_ids", "labels", "document_ids")}
    ids, kept = example["input_ids"].tolist(), []
    document = example.get("document_ids", torch.zeros(len(ids))).tolist()
    labels = example.get("labels", example["input_ids"]).tolist()
    for p, t in enumerate(example.get("anchors", torch.arange(len(ids))).tolist()):
        after = [labels[i] for i in range(t + 1, len(ids)) if document[i] == document[t]]
        if len(after) <= J or -100 in after[: J + 1]:
            continue
        passed = []
        for n in range(N):
            length = int(thoughts.lengths[p, n])
            own = thoughts.thought_ids[p, n, :length].tolist()
            leak = len(after) >= 4 and any(own[i : i + 4] == after[:4] for i in range(length))
            given = {"anchors": torch.tensor([[t]]), "thought_ids": thoughts.thought_ids[p, n].expand(1, 1, N, T)}
            out = qs(**columns, **given, thought_lengths=torch.full((1, 1, N), length))
            gain = float(out.nll_base[0, t : t + J].sum() - out.nll_mix[0, 0, 0].sum())
            if gain >= wanted.min_gain and length <= (wanted.max_length or T) and (wanted.leaks or not leak):
                passed.append((gain, (t, own, thoughts.logprob[p, n, :length].tolist())))
        passed.sort(key=lambda x: -x[0])
        kept += passed[: wanted.keep] if len(passed) >= wanted.keep else []
    return [x for _, x in kept], [gain for gain, _ in kept]


@pytest.mark.parametrize(
    "make, wanted, changes",
    [
        (plain, ThoughtFilter(keep=1, min_gain=-100.0), {}),
        (plain, ThoughtFilter(keep=2, max_length=5, leaks=True), {}),
        (at_places, ThoughtFilter(keep=1), {"reward": "likelihood", "kl_weight": 0.1, "policy_temperature": 1.0}),
        (documents, ThoughtFilter(keep=1, min_gain=0.05), {}),
        (labelled, ThoughtFilter(keep=1), {}),
        (at_places, ThoughtFilter(keep=1, min_gain=-0.1), {}),
    ],
)
def test_the_kept_thoughts_are_those_of_a_loop(tiny, make, wanted, changes):
    qs, examples = thinking(tiny, **changes).eval(), make()
    (batch,) = collate(examples, list(range(len(examples))), 1)
    anchors = batch.get("anchors")
    thoughts = sample(batch, batch["input_ids"].shape[1] if anchors is None else anchors.shape[1])
    places, kept, gain, counts = best(qs, batch, anchors, thoughts, wanted)
    total = 0
    for b, example in enumerate(examples):
        got = []
        for p, k in torch.cartesian_prod(torch.arange(int((places[b] >= 0).sum())), torch.arange(wanted.keep)).tolist():
            length = int(kept.lengths[b, p, k])
            got.append((int(places[b, p]), *(x[b, p, k, :length].tolist() for x in (kept.thought_ids, kept.logprob))))
        own = Thoughts(thoughts.thought_ids[b], thoughts.logprob[b], thoughts.lengths[b])
        want, gains = picked(qs, example, own, wanted)
        assert got == want
        assert gain[b, places[b] >= 0].flatten().tolist() == pytest.approx(gains, abs=1e-4)
        total += len(want)
    assert 0 < total == counts.pop("kept")
    sampled = N * sum(len(x.get("anchors", x["input_ids"])) for x in examples)
    assert counts.pop("sampled") == sampled == sum(counts.values()) + total
    assert wanted.leaks or counts["leaks"] > 0


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_filtered_file_trains(tiny, tmp_path, kind):
    """Any batches give the same file, one text of which keeps nothing; without a filter there is no gain."""
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    qs, data, file = thinking(tiny), texts_of((9, 12, 7, 3)), tmp_path / f"a.{kind}"
    counts = export_thoughts(qs, data, file, batch_size=2, wanted=ThoughtFilter(keep=1))
    assert counts == export_thoughts(qs, data, tmp_path / f"b.{kind}", batch_size=4, wanted=ThoughtFilter(keep=1))
    assert qs.training and counts["kept"] > 0
    one = thinking(tiny, thoughts=1)
    read, same = (OfflineThoughts(tmp_path / f"{name}.{kind}", data, one) for name in "ab")
    assert all(torch.equal(read[i]["thought_ids"], same[i]["thought_ids"]) for i in range(4))
    assert read[3]["anchors"].tolist() == [-1]
    assert counts["kept"] == sum(int((x["anchors"] >= 0).sum()) for x in read)
    (line,) = short_run(one, read, tmp_path / "run", steps=1)
    assert line["reward"] > 0 and math.isfinite(line["loss"])
    if kind == "jsonl":
        records = [json.loads(line) for line in file.read_text().splitlines()]
        gains = [gain for record in records for several in record["gain"] for gain in several]
        assert len(gains) == counts["kept"] and min(gains) >= 0
        assert not export_thoughts(qs, data, file)
        assert {*json.loads(file.read_text().splitlines()[0])} == {"text", "tokenizer", "thought_ids", "logprob"}


def test_texts_that_keep_nothing_train(tiny, tmp_path):
    qs, data = thinking(tiny), plain()
    counts = export_thoughts(qs, data, tmp_path / "a.jsonl", wanted=ThoughtFilter(keep=1, min_gain=1e9))
    one = thinking(tiny, thoughts=1, policy_temperature=1.0)
    (line,) = short_run(one, OfflineThoughts(tmp_path / "a.jsonl", data, one), tmp_path / "run", steps=1)
    assert counts["kept"] == 0 and line["reward"] == 0 and math.isfinite(line["loss"]) and line["loss"] > 0


def test_wrong_filters_are_refused(tiny, tmp_path):
    for wrong in ({"keep": -1}, {"min_gain": math.nan}, {"max_length": -1}, {"leaks": 1}):
        with pytest.raises(ValueError, match=f"ThoughtFilter: {next(iter(wrong))} must be "):
            ThoughtFilter(**wrong)
    qs, file = thinking(tiny), tmp_path / "a.jsonl"
    with pytest.raises(ValueError, match="keep must be at most N=4, the thoughts that are sampled at an anchor, got 5"):
        export_thoughts(qs, plain(), file, wanted=ThoughtFilter(keep=5))
    with pytest.raises(ValueError, match="wanted must be a ThoughtFilter, got 3"):
        export_thoughts(qs, plain(), file, wanted=3)
    assert not file.exists()


@pytest.fixture
def folder(tiny, tmp_path, byte_tokenizer, monkeypatch):
    """A folder with a model that samples one thought, in runs/first, and six texts of 29 tokens."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"Paragraph {i} has a few words."} for i in range(6)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 257}
    qs = wrap(tiny("llama", **small), byte_tokenizer, **CONFIG | {"thoughts": 1})
    qs.save_pretrained(tmp_path / "runs" / "first")
    return tmp_path


@pytest.mark.parametrize("commands", [1, pytest.param(3, marks=pytest.mark.long)])
def test_the_loop_of_the_page_runs(folder, capsys, commands):
    page = (Path(__file__).parents[3] / "docs/offline-thoughts.md").read_text()
    (block,) = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()[:commands]:
        small = ["--length=16", "--held-out=0", *["--steps=1", "--batch-size=2"] * ("quietstar train" in line)]
        assert cli.main([*shlex.split(line)[1:], *small]) == 0, capsys.readouterr().err
    wrote, kept, *reasons = capsys.readouterr().out.split("wrote thoughts about ")[-1].splitlines()
    out = "again.jsonl" if commands == 3 else "kept.jsonl"
    assert wrote == f"11 texts to {out}"
    number, sampled = map(int, re.fullmatch(r"kept (\d+) of ([\d,]+) thoughts; left out:", kept.replace(",", "")).groups())
    assert sampled == 8 * 6 * 29 == number + sum(int(line.replace(",", "").split()[0]) for line in reasons)
    records = [json.loads(line) for line in (folder / out).read_text().splitlines()]
    assert sum(len(record["anchors"]) for record in records) == number > 0
