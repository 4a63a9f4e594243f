"""Use a built wheel as somebody who has nothing else does: ``python tests/installed.py dist``.

In a new environment with the newest versions of what it needs, and in one with the oldest, it is installed with pip, checked,
runs the README's code, trains on a text file and explains a text.
"""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODEL = """
from quietstar.testing import byte_tokenizer, tiny_model
tiny_model(256).save_pretrained("base")
byte_tokenizer().save_pretrained("base")
"""
TEXT = "A model thinks before it speaks. What it thinks is short, and its own.\n"
TRAIN = "--model base --data text.txt --length 16 --held-out 4 --thought-tokens 2 --lookahead 2 --steps 2 --out run"


def main(dist: Path) -> None:
    (wheel,) = dist.resolve().glob("*.whl")
    with ThreadPoolExecutor() as side_by_side:  # most of the time is pip's, which uses one core
        for said in side_by_side.map(partial(use, wheel), ("constraints.txt", "constraints-lowest.txt")):
            print(said, flush=True)


def use(wheel: Path, versions: str) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    blocks = [code for code in blocks if "from trl " not in code]  # which is not installed here
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bin = folder / "environment/bin"
        run([sys.executable, "-m", "venv", bin.parent], folder)
        run([bin / "pip", "install", "-q", "--no-compile", "-c", ROOT / versions, f"{wheel}[train]"], folder)
        said = run([bin / "python", "-m", "quietstar_kernels"], folder)
        assert "\nCPU library " in said, said
        run([bin / "python", "-m", "quietstar_kernels", "check", "--device", "cpu"], folder)
        for code in (*blocks, MODEL):
            run([bin / "python", "-c", code], folder)
        (folder / "text.txt").write_text(TEXT * 100)
        run([bin / "quietstar", "train", *TRAIN.split()], folder)
        run([bin / "quietstar", "explain", "--model", "run", TEXT, "--out", "page.html"], folder)
        assert (folder / "page.html").stat().st_size > 10_000
    return f"with {versions}: installed, right, trained, explained"


def run(command: list, folder: Path) -> str:
    """Output of a command that must succeed; it sees nothing of this environment."""
    environment = {"PATH": os.defpath, "HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    done = subprocess.run(command, cwd=folder, env=environment, text=True, stdout=-1, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with exit code {done.returncode}:\n{done.stdout[-5000:]}")
    return done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
