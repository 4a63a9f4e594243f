"""Where checkpoints are, which of a run's are whole, and which go.

<run>/checkpoints/step-000050/   of ``quietstar train``
<run>/best, <run>/model          of a recipe: its best round, or its result

A run's checkpoint is written to a temporary folder, then renamed; a manifest tells which file is damaged, if any.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from quietstar.files.reading import check_names, check_saved, read_json, sha256
from quietstar.files.writing import follow_umask, naming

# Only folders of this name that hold this step are checkpoints: whatever else is kept beside them is never renamed or removed.
_NAME = re.compile(r"step-([0-9]{6}|[1-9][0-9]{6,})")
_LEFTOVER = re.compile(r"\.step-[0-9]{6,}(-old)?")  # what saves leave when they are killed
CONFIG, MANIFEST, RUN = "config.json", "manifest.json", "run.json"


def folder(out: str | os.PathLike, step: int) -> Path:
    """The checkpoint of a run after ``step`` steps."""
    return Path(out) / "checkpoints" / f"step-{step:06d}"


def every(out: str | os.PathLike) -> list[Path]:
    """The run's checkpoints, oldest first: folders called step-<number> that hold that step; a warning names any that don't."""
    found = []
    named = [path for path in (Path(out) / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name) and is_folder(path)]
    for path in sorted(named, key=step_of):
        if reason := _not_ours(path):
            warnings.warn(f"{path}: passed over: {reason}", stacklevel=1)  # the same place for all callers: it is shown once
        else:
            found.append(path)
    return found


def check_free(out: str | os.PathLike, done: int, steps: int) -> None:
    """Raises ValueError for what is not the run's where one of its steps after ``done`` may be saved."""
    checkpoints = Path(out) / "checkpoints"
    check_folder_or_free(checkpoints)
    for path in sorted(checkpoints.glob("step-*")) + sorted(checkpoints.glob(".step-*")):
        temporary = _LEFTOVER.fullmatch(path.name)
        if (temporary or _NAME.fullmatch(path.name)) and done < step_of(path) <= steps:
            reason = None if temporary and is_folder(path) else _not_ours(path)
            if reason:
                raise ValueError(f"{path}: {reason}, and this run would overwrite it: move it or choose another --out")


def check_folder_or_free(path: Path) -> None:
    """Raises ValueError where a run is to have a folder and something else is, such as a link that leads nowhere."""
    if os.path.lexists(path) and not path.is_dir():
        what = "a link that leads to no folder" if path.is_symlink() else "no folder"
        raise ValueError(f"{path}: it is {what}, and this run would overwrite it: move it or choose another --out")


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(path.name.strip(".").split("-")[1])


def _not_ours(path: Path) -> str | None:
    """Why what is called step-<number> is no checkpoint that was saved under this name; None if it is one, perhaps damaged."""
    if not is_folder(path):
        return "it is a link" if path.is_symlink() else "it is no folder"
    if not (path / RUN).exists():
        return f"it has no {RUN}"
    try:
        step = read_json(path / RUN, dict[str, Any]).get("step")
    except ValueError:
        return None
    return None if step == step_of(path) else f"its {RUN} says step {step}"


def is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def checkpoint_of(name: str | os.PathLike) -> str:
    """The checkpoint that a name stands for: of a run's folder its newest, of a recipe's the best, else the name itself.

    A GGUF file is named by itself: ``folder/file.gguf``, or ``user/model/file.gguf`` on the hub.

    Raises ValueError where the name looks like a local path that doesn't exist.
    """
    text = os.fspath(name)
    path = Path(text)
    if not os.path.exists(text):
        if _is_local(text):
            raise ValueError(f"{text}: there is no such {'file' if is_gguf(text) else 'folder'}")
        return text
    if is_gguf(text):
        return text
    if checkpoints := every(path):
        return str(checkpoints[-1])
    if (path / CONFIG).is_file():
        return text
    return next((str(path / result) for result in ("best", "model") if (path / result / CONFIG).is_file()), text)


def run_of(name: str | os.PathLike) -> Path | None:
    """The run's folder that a checkpoint, or a run's folder itself, is in; None if it is in none."""
    checkpoint = Path(checkpoint_of(name))
    in_run = _NAME.fullmatch(checkpoint.name) and checkpoint.parent.name == "checkpoints"
    return checkpoint.parent.parent if in_run else None


def is_gguf(name: str | os.PathLike) -> bool:
    """Whether a name is that of a GGUF file: a language model and its tokenizer in one file, which transformers unpacks."""
    return os.fspath(name).endswith(".gguf")


def _is_local(name: str) -> bool:
    """Whether a name can't be one on the hub, or stands for a folder here more likely than for one there."""
    first = name.split("/")[0]
    deep = name.count("/") > 1 + is_gguf(name)
    return deep or name.startswith((".", "/", "~")) or "\\" in name or ("/" in name and os.path.isdir(first))


@contextmanager
def new(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes the checkpoint ``path`` at the end, in place of an older one; an error removes it.

    Raises FileExistsError if what has that name is not the run's.
    """
    if os.path.lexists(path) and (reason := _not_ours(path)):
        raise FileExistsError(errno.EEXIST, f"not saved over what is there: {reason}", str(path))
    beside = path.with_name(f".{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    try:
        beside.mkdir()
        with naming(path):
            yield beside
            follow_umask(beside)
        if is_folder(path):
            _remove(path)
        os.replace(beside, path)
    finally:
        _remove_leftovers(path.parent)


def seal(path: Path, hashes: Mapping[str, str] = types.MappingProxyType({})) -> None:
    """Write the manifest that ``check`` reads, and all files to the disk. ``hashes`` are those that are known already."""
    written = sorted(file for file in path.iterdir() if file.is_file())
    files = {file.name: [file.stat().st_size, hashes.get(file.name) or sha256(file)] for file in written}
    (path / MANIFEST).write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")
    for file in [*written, path / MANIFEST]:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def check(path: Path) -> None:
    """Raises ValueError, naming the first file that is missing or not as it was written."""
    import msgspec  # here: a model runs where it is not installed

    try:
        files = read_json(path / MANIFEST, dict[str, tuple[Annotated[int, msgspec.Meta(ge=0)], str]])
    except ValueError as error:
        raise ValueError(f"{path}: {MANIFEST} is missing or damaged: {error}") from error
    check_names(f"{path}: {MANIFEST}", files)
    sizes, hashes = ({name: saved[i] for name, saved in files.items()} for i in (0, 1))
    check_saved(path, lambda name: str(path / name) if os.path.lexists(path / name) else None, sizes, hashes)


def newest_whole(paths: list[Path], on_damaged: Callable[[ValueError], Any] = lambda error: None) -> Path | None:
    """The last of a run's checkpoints that is not damaged, None if there is none."""
    for path in reversed(paths):
        try:
            check(path)
        except ValueError as error:
            on_damaged(error)
        else:
            return path
    return None


def remove_others(path: Path, keep: int, later: bool) -> None:
    """Remove all but the newest ``keep`` checkpoints of a run up to this one, perhaps the ``later`` ones too, and leftovers."""
    paths = every(path.parent.parent)
    end = paths.index(path) + 1
    for other in reversed(paths[end:] if later else []):
        _remove(other)
    _remove_leftovers(path.parent)
    for other in paths[: max(0, end - keep)]:
        _remove(other)


def _remove(path: Path) -> None:
    """Rename, then remove: if this is killed halfway, no half checkpoint must be left under its name."""
    old = path.with_name(f".{path.name}-old")
    os.replace(path, old)
    shutil.rmtree(old)


def _remove_leftovers(checkpoints: Path) -> None:
    """Remove what saves that were killed or failed have left."""
    for path in checkpoints.iterdir():
        if _LEFTOVER.fullmatch(path.name) and is_folder(path):
            shutil.rmtree(path, ignore_errors=True)
