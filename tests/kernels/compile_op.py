"""``compile_op.py sm_90 thorough thought_decode``: what each kernel of the ops takes on a target, as JSON lines.

``compiled/<op>.py`` yields the launches: host functions of the op on meta tensors. "usual" leaves out dtypes and options of
which the tables of tiles know nothing; "brief", all but heads of 128 in 16 bit; "thorough" leaves trees to "trees", so that
the two can run side by side; "gluon" are the kernels in Gluon, and own keys beside them. For sm_90 "loops" are those of the
kernels in HGMMA, in 16 bits. "advice" holds the codes of ptxas's advice on a kernel. C7515 and similar ones mean that products
wait for each other. "fences" is what ``fences.missing`` finds, and how much more without each of the fences.
"""

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"  # on stdout, for kernels that are not in the cache
sys.path.insert(0, str(Path(__file__).parent))

import importlib  # noqa: E402

import fences  # noqa: E402
import machine_code  # noqa: E402
from ahead_of_time import compiled_for, disassembly, resources  # noqa: E402


def main(target: str, extent: str, *ops: str) -> None:
    for op in ops:
        compile_op(op, target, extent)


def compile_op(op: str, target: str, extent: str) -> None:
    cases = importlib.import_module(f"compiled.{op}")
    seen = set()
    in_gluon = extent == "gluon"
    os.environ["QUIETSTAR_GLUON"] = str(int(in_gluon))
    for label, launch in cases.gluon_launches() if in_gluon else cases.launches(target, extent == "thorough"):
        if extent == "brief" and ("float32" in label or ("K=" in label and "K=128" not in label)):
            continue
        if extent in ("thorough", "trees") and label.endswith("on a tree") != (extent == "trees"):
            continue
        with (
            compiled_for(target, {*cases.GLUON, "attention_backward_keys"} if in_gluon else None) as kernels,
            contextlib.redirect_stdout(io.StringIO()) as log,
        ):
            launch()
        advice = re.findall(r"\((C\d+)\).* in the function '(\w+)'", log.getvalue())
        for kernel in kernels:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                advised = sorted({code for code, name in advice if name == kernel.metadata.name})
                row = {"op": op, "label": label, "advice": advised, **asdict(resources(kernel))}
                row["warp_groups"] = "wgmma.mma_async" in kernel.asm.get("ptx", "")
                if target == "sm_90" and row["kernel"] in cases.HGMMA and "float32" not in label:
                    row["loops"] = [asdict(loop) for loop in machine_code.loops(machine_code.instructions(disassembly(kernel)))]
                if in_gluon:
                    row["fences"] = fences.missing(kernel.asm["ptx"]), fences.missing_without(kernel.asm["ptx"])
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as os.environ["TRITON_CACHE_DIR"]:
        main(*sys.argv[1:])
