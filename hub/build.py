"""Make build/hub/, what a repository of the Hugging Face kernels hub holds: this package without its compiled libraries.

    python hub/build.py [folder]

A folder for each kind of device has the same files, which import each other relatively, and a name of its own, under which its
operators are registered; so versions loaded side by side don't fight over them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "quietstar_kernels"
DEVICES = ("cpu", "cuda", "rocm")
VERSION = 1  # of the interface: users of the hub ask for it


def build(to: Path) -> None:
    """Writes ``to``, which is emptied first."""
    shutil.rmtree(to, ignore_errors=True)
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
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:10]


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else HERE.parent / "build/hub")
    build(folder)
    print(folder)
