"""Files and folders that are replaced: nobody's are lost, and what killed processes left is removed."""

import multiprocessing
import os
import resource
import signal
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file

from quietstar import QuietStar, ThoughtConfig
from quietstar.checkpoints import places
from quietstar.data.thoughts import write_records
from quietstar.files import writing
from quietstar.files.writing import beside, replaced, write_whole
from quietstar.run.metrics import Metrics
from tests.quietstar.conftest import make_byte_tokenizer

fork = multiprocessing.get_context("fork")


def die_while_writing(path):
    with write_records(path, {"x": ("int32", 0)}) as write:
        write([{"x": 1}])
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_export_leaves_nothing_after_the_next(tmp_path):
    path = tmp_path / "thoughts.jsonl"
    process = fork.Process(target=die_while_writing, args=(path,))
    process.start()
    process.join()
    (left,) = tmp_path.iterdir()
    mine = [tmp_path / name for name in (".thoughts.jsonl-notes", ".thoughts.jsonl-1.old", ".other.jsonl-1")]
    for file in mine:
        file.write_text("mine")
    with beside(path) as one:
        one.write_text("under way")
        assert not left.exists()
        with beside(path.with_suffix(".txt")) as other:
            other.write_text("another")
            assert one.exists()
    assert sorted(tmp_path.iterdir()) == sorted([path, path.with_suffix(".txt"), *mine])


@contextmanager
def written_folder(path):
    """A folder of one file, as ``beside`` writes a file."""
    with replaced(path) as new:
        yield new / "x"


@pytest.mark.parametrize("writer, name", [(beside, "x.json"), (written_folder, "model/x")])
def test_what_a_living_process_writes_is_left_alone(tmp_path, writer, name):
    def write(text, pipe=None):
        with writer(tmp_path / name.split("/")[0]) as file:
            file.write_text(text)
            if pipe is not None:
                pipe.send(file)
                pipe.recv()

    pipe, theirs = fork.Pipe()
    process = fork.Process(target=write, args=("theirs", theirs), daemon=True)
    process.start()
    file = pipe.recv()
    write("ours")
    assert file.read_text() == "theirs" and (tmp_path / name).read_text() == "ours"
    pipe.send("end")
    process.join()
    assert len(os.listdir(tmp_path)) == 1 and (tmp_path / name).read_text() == "theirs"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    def full(*paths):
        raise OSError("No space left on device")

    write_whole(tmp_path / "x", "old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "x", "new")
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "old"


@contextmanager
def largest_file(size):
    """No file may get more bytes; Python ignores the signal that would say so."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_errors_of_the_disk_name_the_file(tiny, tmp_path):
    """Those of Python, safetensors, tokenizers and pyarrow; what was begun is removed."""
    qs = QuietStar(tiny("llama", vocab_size=257), ThoughtConfig(), make_byte_tokenizer(), verify=False)
    metrics = Metrics(tmp_path / "metrics.jsonl", 0, write=True)

    def save(path):
        with places.new(path) as beside:
            save_file({"x": torch.zeros(1000)}, beside / "x")

    def write(path):
        with write_records(path, {"x": ("int32", 0)}) as rows:
            rows([{"x": 1}])

    def tokenizer(path):
        with replaced(path) as new:
            make_byte_tokenizer().save_pretrained(new)

    cases = [
        ("words.txt", 4, lambda path: write_whole(path, "four words and more")),
        ("metrics.jsonl", 4, lambda path: metrics.add({"step": 1})),
        ("step-000001", 4, save),
        ("thoughts.jsonl", 4, write),
        *([("thoughts.parquet", 4, write)] if find_spec("pyarrow") else []),
        ("tokenizer", 500, tokenizer),
        *(("model", size, qs.save_pretrained) for size in (0, 500, 1000, 60_000)),
    ]
    for name, size, function in cases:
        with largest_file(size), pytest.raises(OSError, match=f"File too large: '{tmp_path / name}'$"):
            function(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_links_stay_links(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "folder").symlink_to("there")
    (tmp_path / "file").symlink_to("there/x.txt")
    write_whole(tmp_path / "file", "text")
    with replaced(tmp_path / "folder") as new:
        (new / "y.txt").write_text("text")
    assert os.readlink(tmp_path / "folder") == "there" and os.readlink(tmp_path / "file") == "there/x.txt"
    assert sorted(os.listdir(tmp_path / "there")) == ["x.txt", "y.txt"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_there_at_every_moment_with_what_others_keep_in_it(tmp_path, monkeypatch, exchange):
    """A kill at any system call that changes the folder's parent leaves a whole folder, where the system can exchange two."""
    folder, seen = tmp_path / "model", []
    (folder / "sub").mkdir(parents=True)
    mine = ("notes.txt", "sub/notes.txt", "backup.safetensors", ".git/config")
    gone = ("model.safetensors", "model-00001-of-00002.safetensors")  # of an earlier save
    (folder / ".git").mkdir()
    (folder / "link").symlink_to("/nowhere")
    for name in (*mine, *gone, "state.json"):
        (folder / name).write_text("old")

    def looked(function):
        def wrapped(*args, **options):
            seen.append(sorted(os.listdir(folder)) if folder.exists() else None)
            found = function(*args, **options)
            seen.append(sorted(os.listdir(folder)) if folder.exists() else None)
            return found

        return wrapped

    monkeypatch.setattr(writing, "_exchange", looked(writing._exchange) if exchange else lambda *_: False)
    monkeypatch.setattr(writing.os, "link", looked(os.link))
    monkeypatch.setattr(writing.shutil, "rmtree", looked(writing.shutil.rmtree))
    with replaced(folder) as new:
        (new / "state.json").write_text("new")
        (new / "sub").mkdir()
        (new / "sub" / "x").write_text("new")
    assert (folder / "state.json").read_text() == "new" and (folder / "sub" / "x").read_text() == "new"
    assert {(folder / name).read_text() for name in mine} == {"old"} and os.readlink(folder / "link") == "/nowhere"
    assert not any((folder / name).exists() for name in gone) and os.listdir(tmp_path) == ["model"]
    if exchange and writing._exchange(tmp_path, tmp_path):  # the system can
        assert all(names is not None and {"notes.txt", "state.json"} <= set(names) for names in seen)


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def refused(*args, **options):
        raise OSError("no links here")

    monkeypatch.setattr(writing.os, "link", refused)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("notes")
    with replaced(tmp_path / "model") as new:
        (new / "x").write_text("x")
    assert sorted(os.listdir(tmp_path / "model")) == ["notes.txt", "x"]


@pytest.mark.parametrize("moment", ["while it writes", "old folder moved away", "new folder in place"])
def test_what_a_killed_process_left_of_a_folder_is_put_right(tmp_path, monkeypatch, moment):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("notes.txt", "state.json"):
        (folder / name).write_text("old")
    mine = [tmp_path / name for name in (".model-notes", ".model-1-mine", "model-best")]
    for path in mine:
        path.mkdir()

    def die(*arguments, **options):
        os.kill(os.getpid(), signal.SIGKILL)

    def write():
        monkeypatch.setattr(writing, "_exchange", lambda *_: False)  # with it there are only the first and the last moment
        rename = os.replace
        with replaced(folder) as new:
            (new / "state.json").write_text("new")
            if moment == "while it writes":
                die()
            if moment == "old folder moved away":
                monkeypatch.setattr(writing.os, "replace", lambda one, other: die() if other == folder else rename(one, other))
            monkeypatch.setattr(writing.shutil, "rmtree", die)

    process = fork.Process(target=write)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and folder.exists() == (moment != "old folder moved away")
    writing.put_back(folder)
    assert (folder / "state.json").read_text() == ("new" if moment == "new folder in place" else "old")
    with replaced(folder) as new:
        (new / "state.json").write_text("newer")
    assert sorted(tmp_path.iterdir()) == sorted([folder, *mine])
    assert (folder / "notes.txt").read_text() == "old" and (folder / "state.json").read_text() == "newer"


def test_checkpoints_inside_a_folder_keep_their_weights_and_their_age(tmp_path):
    """A Trainer keeps its checkpoints in the folder that it saves the last model to, and removes the oldest."""
    inner = tmp_path / "out/checkpoint-2"
    inner.mkdir(parents=True)
    for folder in (inner.parent, inner):
        (folder / "model.safetensors").write_text("old")
        (folder / "quietstar.json").write_text("old")
    os.utime(inner, (1000, 1000))
    with replaced(tmp_path / "out") as beside:
        (beside / "quietstar.json").write_text("new")
    assert sorted(path.name for path in inner.parent.iterdir()) == ["checkpoint-2", "quietstar.json"]
    assert sorted(path.name for path in inner.iterdir()) == ["model.safetensors", "quietstar.json"]
    assert (inner / "quietstar.json").read_text() == "old" and inner.stat().st_mtime == 1000


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o002])
def test_modes_follow_the_umask(tmp_path, umask):
    """Of folders and files, also those that safetensors makes for their owner alone; a folder that is there keeps its own."""
    before = os.umask(umask)
    try:
        for folder in (tmp_path / "model", tmp_path / "checkpoints" / "step-000001"):
            with writing.replaced(folder) if folder.name == "model" else places.new(folder) as beside:
                save_file({"x": torch.ones(1)}, beside / "model.safetensors")
                (beside / "inner").mkdir()
                save_file({"x": torch.ones(1)}, beside / "inner" / "x.safetensors")
                (beside / "config.json").write_text("{}")
            for path in [folder, *folder.rglob("*")]:
                assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
        with writing.beside(tmp_path / "one.safetensors") as file:
            save_file({"x": torch.ones(1)}, file)
        assert (tmp_path / "one.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
        (tmp_path / "model").chmod(0o700)
        with writing.replaced(tmp_path / "model") as beside:
            (beside / "config.json").write_text("{}")
        assert (tmp_path / "model").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)
