"""Files of every kind, several of them, and what is said of those that are not read or damaged."""

import gzip
import io
import json
import sys
import types

import pytest

from quietstar.data import sources
from quietstar.data.texts import DataConfig, read_texts
from quietstar.evaluation.questions.reading import read_questions

ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"  # where str.splitlines ends a line
WORDS = ["one" + ENDS + "more", "NA", "007", "1.50", '"quoted", 2']


def write(path):
    """The texts ``WORDS`` as a file of the kind that its name says."""
    name = path.name.removesuffix(".gz")
    rows = [{"text": x, "id": i} for i, x in enumerate(WORDS)]
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow.parquet").write_table(__import__("pyarrow").Table.from_pylist(rows), path)
        return
    content = "".join(json.dumps(x) + "\n" for x in rows)
    if name.endswith(".json"):
        content = json.dumps(rows, indent=1)
    if name.endswith(".txt"):
        content = "\n".join(WORDS)
    if name.endswith(".csv"):
        content = "text,id\r\n" + "".join('"{}",{}\r\n'.format(x["text"].replace('"', '""'), x["id"]) for x in rows)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())


def read(data, **options):
    return read_texts(DataConfig(data=str(data), pack=False, **options))


@pytest.mark.parametrize("end", sources.FILES)
def test_each_kind_of_file(tmp_path, end):
    if end in sources.TABLES:
        pytest.importorskip("datasets")
    path = tmp_path / f"a[1], b{end}"
    write(path)
    assert read(path) == WORDS
    if end != ".txt":  # which may be any text
        whole = path.read_bytes()
        path.write_bytes(whole[: -len(whole) // 3] if end.endswith("gz") else whole[: len(whole) // 2] + b'"\xff\n{')
        with pytest.raises(ValueError) as error:
            read(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_several_files_folders_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "d/b, c.txt", "d/e/f.json", "d/.git/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name)
    (tmp_path / "d" / "README.md").write_text("about")
    assert read("a.jsonl,d/e/f.json,a.jsonl") == 3 * WORDS
    assert read_texts(DataConfig(data=["a.jsonl", "d/b, c.txt"], pack=False)) == 2 * WORDS
    assert read("d/*.txt") == read("**/*.json") == WORDS
    with pytest.warns(UserWarning, match="1 files are not read, such as README.md"):
        assert read("d") == 2 * WORDS
    (tmp_path / "d" / "train.jsonl").touch()
    (tmp_path / "d" / "e" / "test-00.jsonl").touch()
    for data, says in (("d", "several splits"), ("*.pdf", "no file"), ("d/.git/../..,x.pdf", "several splits|x.pdf")):
        with pytest.raises(ValueError, match=says):
            read(data)


@pytest.mark.parametrize("content", ["".join(json.dumps({"text": x}) + "\n" for x in WORDS), "\n".join(WORDS)])
def test_standard_input(monkeypatch, content):
    stdin = types.SimpleNamespace(buffer=io.BytesIO(content.encode()), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", stdin)
    sources._stdin.cache_clear()
    assert read("-") == read("-") == WORDS
    sources._stdin.cache_clear()
    stdin.isatty = lambda: True
    with pytest.raises(ValueError, match="must be a pipe"):
        read("-")


def test_hub_rows_that_are_left_are_said(monkeypatch):
    rows = [{"text": str(i)} for i in range(9)]
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: iter(rows)))
    with pytest.warns(UserWarning, match=r"some/data: only the first 8 rows of the split 'train' are read, and there are more"):
        assert len(read("some/data", hub_texts=8)) == 8
    assert len(read("some/data", hub_texts=9)) == 9


def test_published_files_of_implicit_chains(tmp_path):
    (tmp_path / "a.txt").write_text("1 2 * 3||3 6 #### 3 6\n\nHow many?||<<2*2=4>> #### 4\n")
    assert [(x.text, x.answer) for x in read_questions(str(tmp_path / "a.txt"))] == [("1 2 * 3", "36"), ("How many?", "4")]
