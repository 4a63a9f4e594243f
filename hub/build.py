"""Make build/hub/, what a repository of the Hugging Face kernels hub holds: this package without its compiled libraries.

    python hub/build.py [folder]

The folder must be new or empty, or made by this script. It is written beside and renamed, in place of an older one.

A folder for each kind of device has the same files, which import each other relatively, and a name of its own, under which its
operators are registered; so versions loaded side by side don't fight over them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "quietstar_kernels"
DEVICES = ("cpu", "cuda", "rocm")
VERSION = 1  # of the interface: users of the hub ask for it


def build(to: Path) -> None:
    """Writes the folder ``to``. Raises ValueError where something is there that this script didn't write."""
    to = to.resolve()
    if to.exists() and not _replaceable(to):
        raise ValueError(f"{to}: it holds other things than what this script writes: name a new or empty folder")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}-", dir=to.parent) as beside:
        new = Path(beside) / "new"
        _write(new)
        if to.exists():
            to.rename(Path(beside) / "old")
        new.rename(to)


def _replaceable(folder: Path) -> bool:
    """Whether a folder is empty, or holds what ``_write`` wrote and nothing else."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    devices = sorted((folder / "build").glob("*"))
    ours = names == {"README.md", "LICENSE", "build"} and {x.name for x in devices} == {f"torch-{x}" for x in DEVICES}
    return not names or (ours and all(map(_unchanged, devices)))


def _unchanged(folder: Path) -> bool:
    try:
        return str(json.loads((folder / "metadata.json").read_text())["id"]).endswith(f"_{_digest(folder)}")
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _write(to: Path) -> None:
    for device in DEVICES:
        folder = to / "build" / f"torch-{device}"
        shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        shutil.copy(HERE / "attention.py", folder)
        with (folder / "__init__.py").open("a") as init:
            init.write("\nfrom .attention import flash_attn_forward, supports_flash_attn  # noqa: E402, F401\n")
        metadata = {
            "id": f"_quietstar_kernels_{device}_{_digest(folder)}",
            "name": "quietstar-kernels",
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": device},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    release = re.search(r'__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text())
    assert release is not None
    (to / "README.md").write_text((HERE / "card.md").read_text().replace("VERSION", release[1]))
    shutil.copy(HERE.parent / "LICENSE", to)


def _digest(folder: Path) -> str:
    others = ("metadata.json", "__pycache__")  # the first has the digest, the second comes where the copy is imported
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not set(path.parts).intersection(others))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:10]


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else HERE.parent / "build/hub")
    try:
        build(folder)
    except ValueError as error:
        sys.exit(str(error))
    print(folder)
