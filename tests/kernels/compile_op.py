"""``python tests/kernels/compile_op.py thought_decode sm_90``: what every shipped kernel of an op takes there, as JSON lines.

``compiled/<op>.py`` yields the launches: the host functions of the op on meta tensors.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).parent))

import importlib  # noqa: E402

from ahead_of_time import compiled_for, resources  # noqa: E402


def main(op: str, target: str) -> None:
    cases = importlib.import_module(f"compiled.{op}")
    seen = set()
    for label, launch in cases.launches(target):
        with compiled_for(target) as kernels:
            launch()
        for kernel in kernels:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                print(json.dumps({"label": label} | asdict(resources(kernel, target))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
