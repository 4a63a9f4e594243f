"""Thoughts in files: training on them equals training on sampled ones, and broken records are named by file and line."""

import hashlib
import json
import sys
import tracemalloc

import pytest
import torch

from quietstar.data.thoughts import OfflineThoughts, export_thoughts, open_records, text_hash, tokenizer_hash
from quietstar.run.batches import mix_seed
from quietstar.training import thought_loss
from tests.quietstar.common import short_run, texts_of, wrap

CONFIG = {"thoughts": 2, "thought_tokens": 3, "lookahead": 2, "policy_weight": 5.0, "embedding_scale": 1.0}
LENGTHS = (7, 9, 8, 9, 7)
KINDS = ("jsonl", "parquet")


def texts():
    return texts_of(LENGTHS)


def packed():
    return [{"input_ids": x["input_ids"][:7], "document_ids": torch.arange(7) // 4} for x in texts()]


def some_anchors():
    return [x | {"anchors": torch.tensor([1, 4, 5][: 1 + i % 3])} for i, x in enumerate(texts())]


def thinking(tiny, **changes):
    return wrap(tiny("llama"), spread=0.3, **CONFIG | changes)


def needed(kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow")


def learn(qs, data, out, **changes):
    """Metrics and weights after one step."""
    (line,) = short_run(qs, data, out, **{"steps": 1, "batch_size": 5, "warmup": 0, "learning_rate": 1e-3, **changes})
    weights = torch.cat([x.detach().flatten() for x in qs.parameters()])
    return line, weights


CASES = {
    "everywhere": (texts, {}),
    "where tokens surprise": (texts, {"anchors": "entropy"}),
    "given places": (some_anchors, {}),
    "documents": (packed, {}),
    "that stop": (texts, {"end_token_id": 2, "stop_threshold": 1 / 61}),
}


@pytest.mark.parametrize("kind, case", [*(("jsonl", case) for case in CASES), ("parquet", "everywhere")])
def test_a_step_on_exported_thoughts_is_the_step_that_samples_them(tiny, tmp_path, kind, case):
    """With any batches of the export and any parts of the step."""
    needed(kind)
    make, changes = CASES[case]
    file, data = tmp_path / f"thoughts.{kind}", make()
    export_thoughts(thinking(tiny, **changes), data, file, seed=mix_seed(0, 0), batch_size=2)
    want, weights = learn(thinking(tiny, **changes), data, tmp_path / "sampled")
    qs = thinking(tiny, **changes | {"anchors": "all"})
    got, same = learn(qs, OfflineThoughts(file, data, qs), tmp_path / "read", accumulation=2)
    with pytest.raises(ValueError, match="anchors must be 'all' where the texts bring their own"):
        learn(thinking(tiny, anchors="every"), OfflineThoughts(file, data, qs), tmp_path / "every")
    want.setdefault("thought_length", got["thought_length"])  # logged where lengths can vary
    assert got == pytest.approx(want, rel=1e-4, abs=1e-6) and want["reward"] != 0
    # AdamW's first step divides gradients by their size, so tiny ones are mostly rounding.
    assert (same - weights).norm() <= 1e-3 * (weights - torch.cat([x.flatten() for x in thinking(tiny).parameters()])).norm()


def example():
    return {"input_ids": torch.arange(3, 11)}


RECORD = {"tokenizer": "", "anchors": [2, 6], "thought_ids": [[[5, 6, 7], [8]], [[], [9, 10]]]}
RECORD["text"] = hashlib.sha256(b"3 4 5 6 7 8 9 10").hexdigest()
LOGPROB = [[[-1.5, -0.25, -3.0], [-2.0]], [[], [0.0, -0.5]]]


def write(path, *records):
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in records))
    return path


def test_a_record_of_another_engine(tiny, tmp_path):
    """As in docs/training.md, with an unknown field and blank lines."""
    file = write(tmp_path / "a.jsonl", "", RECORD | {"engine": "another", "logprob": LOGPROB}, "")
    got = OfflineThoughts(file, [example()], thinking(tiny, policy_temperature=1.0))[0]
    assert torch.equal(got["input_ids"], example()["input_ids"])
    assert got["anchors"].tolist() == [2, 6]
    assert got["thought_ids"].tolist() == [[[5, 6, 7], [8, 0, 0]], [[0, 0, 0], [9, 10, 0]]]
    assert got["thought_lengths"].tolist() == [[3, 1], [0, 2]]
    assert got["old_logprob"].tolist() == [[[-1.5, -0.25, -3.0], [-2.0, 0, 0]], [[0, 0, 0], [0.0, -0.5, 0]]]
    assert "old_logprob" not in OfflineThoughts(file, [example()], thinking(tiny))[0]  # the policy's temperature is another

    everywhere = {name: x for name, x in RECORD.items() if name != "anchors"} | {"thought_ids": [[[1], [2]]] * 8}
    got = OfflineThoughts(
        write(tmp_path / "b.jsonl", everywhere), [example() | {"anchors": torch.tensor([1])}], thinking(tiny)
    )[0]
    assert "anchors" not in got and got["thought_ids"].shape == (8, 2, 3)
    nowhere = RECORD | {"anchors": [], "thought_ids": []}
    got = OfflineThoughts(write(tmp_path / "c.jsonl", nowhere), [example()], thinking(tiny))[0]
    assert got["anchors"].tolist() == [-1] and got["thought_lengths"].tolist() == [[0, 0]]


def test_the_hash_of_a_tokenizer_is_as_documented(byte_tokenizer):
    lines = "".join(f"{i} {byte_tokenizer.convert_ids_to_tokens(i)}\n" for i in range(257))
    assert tokenizer_hash(byte_tokenizer) == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_records_find_their_texts_in_any_order(tiny, tmp_path, kind):
    """Including the records of a text that occurs twice, in order."""
    needed(kind)
    qs, file = thinking(tiny), tmp_path / f"thoughts.{kind}"
    data = [*texts(), texts()[1]]
    export_thoughts(qs, data, file, seed=3, batch_size=4)
    read = OfflineThoughts(file, data, qs)
    order = [4, 1, 5, 0, 3, 2]
    shuffled = OfflineThoughts(file, [data[i] for i in order], qs)
    for place, i in enumerate(order):
        assert torch.equal(shuffled[place]["thought_ids"], read[i]["thought_ids"])
        ids = data[i]["input_ids"][None]
        alone = qs.think(ids, seed=3, sequence_ids=torch.tensor([i]), greedy=False)
        assert torch.equal(read[i]["thought_ids"], alone.thought_ids[0])
    assert not torch.equal(read[1]["thought_ids"], read[5]["thought_ids"])


def test_log_probabilities_of_the_sampler_stay_over_further_updates(tiny, tmp_path):
    """Every update's ratio is relative to them, so they change the loss of the first one too."""
    changes = {"policy_temperature": 1.0, "ratio_clip": 0.2, "advantage": "mean"}
    qs, data, file = thinking(tiny, **changes), texts(), tmp_path / "a.jsonl"
    export_thoughts(qs, data, file)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        line["logprob"] = [[[x - 1 for x in one] for one in several] for several in line["logprob"]]
    moved = write(tmp_path / "b.jsonl", *lines)
    seen = []

    def loss(model, texts, counts, seed):
        seen.append(texts.old_logprob)
        value, out = thought_loss(model, texts, counts, seed)
        ratios.append(float((out.logprob - texts.old_logprob)[out.logprob != 0].mean()))
        return value, out

    for path, first in ((file, 0.0), (moved, 1.0)):
        ratios = []
        qs = thinking(tiny, **changes)
        short_run(qs, OfflineThoughts(path, data, qs), tmp_path / path.stem, loss=loss, steps=1, batch_size=5, updates=2)
        assert torch.equal(seen[-1], seen[-2])
        assert ratios[0] == pytest.approx(first, abs=1e-4) and ratios[1] != pytest.approx(first, abs=1e-4)


LONG = {"anchors": [2, 6], "thought_ids": [[[5, 6, 7, 8], [8]], [[], [9]]]}
BAD = {
    "not JSON": ("{", " is not JSON"),
    "no object": ([1], ": Expected object, got array"),
    "tokenizer": ({"tokenizer": "ab" * 32}, ": tokenizer must be the model's, none, got abababababab…"),
    "another text": (
        {"text": "ab" * 32},
        " is about a text that the data does not have, or one that was cut differently: abab",
    ),
    "twice": ({"text": text_hash(texts()[0]["input_ids"])}, " is about a text that already has its thoughts: "),
    "order": ({"anchors": [6, 2]}, r": anchors must be positions from 0 to L-1=7, ascending, got \[6, 2\]"),
    "places": ({"anchors": [2]}, ": thought_ids must have a list for each of P=1 anchors, got 2"),
    "thoughts": ({"thought_ids": [[[5], [8]], [[9]]]}, ": thought_ids must have N=2 thoughts at an anchor, got 1"),
    "length": (LONG, ": thought_ids must have at most T=3 tokens in a thought, got 4"),
    "vocabulary": ({"thought_ids": [[[5], [61]], [[], [9]]]}, ": thought_ids must be from 0 to V-1=60, got 61"),
    "banned": ({"thought_ids": [[[5], [60]], [[], [9]]]}, ": thought_ids must not hold the start- or end-of-thought id 60"),
    "logprob": ({"logprob": [[[-1.0], [-2.0]], [[], [-1.0]]]}, ": logprob must have a number for each token of thought_ids"),
    "likelihood": ({"logprob": [[[1, 0, 0], [0]], [[], [0, 0]]]}, ": logprob must be log-probabilities, .* at most 0, got 1.0"),
    "only here": ({"logprob": LOGPROB}, ": logprob must be in every record or in none, and line 1 has none"),
    "missing": ("", r": no thoughts about 1 of the 2 texts, the first is example 1: "),
}


@pytest.mark.parametrize("case", BAD)
def test_a_broken_record_is_named_by_file_and_line(tiny, tmp_path, case):
    wrong, message = BAD[case]
    other = texts()[0]
    first = {"text": text_hash(other["input_ids"]), "tokenizer": "", "anchors": [1], "thought_ids": [[[5], [6]]]}
    line = RECORD | wrong if isinstance(wrong, dict) else wrong if isinstance(wrong, str) else json.dumps(wrong)
    file = write(tmp_path / "a.jsonl", first)
    file.write_bytes(
        file.read_bytes() + (json.dumps(line) if isinstance(line, dict) else line).encode(errors="surrogateescape")
    )
    with pytest.raises(ValueError, match=message) as raised:
        OfflineThoughts(file, [other, example()], thinking(tiny, end_token_id=60))
    where = f"{file}: line 2" if case != "missing" else str(file)
    assert str(raised.value).startswith(where) and "\n" not in str(raised.value)


def test_rows_of_parquet_are_named(tiny, tmp_path):
    """Across row groups."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": text_hash(x["input_ids"]), "tokenizer": "", "anchors": [1], "thought_ids": [[[5], [6]]]} for x in texts()]
    rows[3]["thought_ids"] = [[[5], [61]]]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    with pytest.raises(ValueError, match="a.parquet: row 4: thought_ids must be from 0 to V-1=60, got 61"):
        OfflineThoughts(tmp_path / "a.parquet", texts(), thinking(tiny))
    damaged = bytearray((tmp_path / "a.parquet").read_bytes())
    place = parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0).dictionary_page_offset
    damaged[place : place + 40] = bytes(40)
    (tmp_path / "b.parquet").write_bytes(damaged)
    with pytest.raises(ValueError, match="b.parquet: rows 3 to 4 are damaged: "):
        OfflineThoughts(tmp_path / "b.parquet", texts(), thinking(tiny))


def test_files_that_cannot_be_read_or_written(tiny, tmp_path, monkeypatch):
    qs = thinking(tiny)
    (tmp_path / "a.parquet").write_bytes(b"no table")
    for name, message in (
        ("no.jsonl", "No such file"),
        ("a.csv", "ending in .jsonl or .parquet"),
        ("a.parquet", "not a parquet"),
    ):
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            OfflineThoughts(tmp_path / name, texts(), qs)
    with pytest.raises(ValueError, match="ending in .jsonl or .parquet"):
        export_thoughts(qs, texts(), tmp_path / "a.csv")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for call in (lambda: export_thoughts(qs, texts(), tmp_path / "b.parquet"), lambda: open_records(tmp_path / "a.parquet")):
        with pytest.raises(ValueError, match=r"parquet files need pyarrow \(pip install pyarrow\)"):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet"]


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_file(tiny, tmp_path, kind):
    """Opening and reading a file with four times the records takes hardly more memory."""
    needed(kind)
    qs, peaks = thinking(tiny), []
    for count in (12, 48):
        data = [{"input_ids": torch.tensor([3 + i % 50, 3 + i // 50, *range(3, 53)])} for i in range(count)]
        file = tmp_path / f"{count}.{kind}"
        export_thoughts(qs, data, file, batch_size=12)
        tracemalloc.start()
        read = OfflineThoughts(file, data, qs)
        for i in range(count):
            read[i]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
    if kind == "parquet":
        assert open_records(file).file.num_row_groups == 4
