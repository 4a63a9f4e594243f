"""``python -m quietstar_kernels`` prints versions and which back end serves which op; ``check`` tests the results."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence

import torch

from . import __version__, _dispatch, cpu_library, cuda_library, self_test
from .cpu.products import cpu_products
from .linear_logprob import default_keep_bytes
from .triton import gluon_is_on, gluon_why_not_on

OF_RECURRENT = ("pytorch", "matmul", "fla")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m quietstar_kernels",
        description="Without a command, print versions and which back end serves which op here.",
    )
    commands = parser.add_subparsers(dest="command", title="commands", metavar="check")
    checking = commands.add_parser(
        "check",
        help="compare every back end with plain PyTorch in fp64; exit code 1 if one is wrong",
        description="Compare the forward and backward of every op, on every back end of a device, with plain PyTorch in fp64. "
        "Prints a row for each dtype, with the worst error over what is allowed. Exit code 1 if one is wrong.",
    )
    checking.add_argument("--device", help="such as cuda:1 or cpu; default the GPU if there is one")
    checking.add_argument(
        "--backend",
        choices=(*_dispatch.BACKENDS, *OF_RECURRENT),
        help="check only this one; default the reference and what auto may choose on the device",
    )
    ops = list(self_test.BACKENDS)
    checking.add_argument("--op", nargs="+", choices=ops, default=ops, metavar="OP", help=f"only some of {', '.join(ops)}")
    args = parser.parse_args(argv)
    try:
        gluon_is_on()
    except ValueError as error:
        parser.error(str(error))
    if args.command is None:
        show_backends()
        return 0
    return run_check(checking, args)


def show_backends() -> None:
    show_versions()
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in devices:
        print(f"\n{device} ({device_name(device)})")
        for op, names in self_test.BACKENDS.items():
            for name in names:
                print(f"  {op:<18} {name:<10} {self_test.why_not(op, name, torch.device(device)) or 'available'}")
        show_attention(torch.device(device), "  ")
        kept = default_keep_bytes(torch.device(device)) / 2**20
        print(f"  linear_logprob keeps logits for its backward up to {kept:,.0f} MiB")


def show_attention(device: torch.device, indent: str = "") -> None:
    """Whose kernels the back end "triton" runs, and why not the others."""
    if self_test.why_not("thought_attention", "triton", device):
        return
    if reason := gluon_why_not_on(device):
        print(f"{indent}attention: Triton's kernels; Gluon's do not run here: {reason}")
    elif gluon_is_on():
        print(f"{indent}attention: Gluon's kernels for heads of 64 and of 128 in 16 bits, else Triton's")
    else:
        print(f"{indent}attention: Triton's kernels; QUIETSTAR_GLUON=1 turns on Gluon's for heads of 64 and of 128 in 16 bits")


def show_versions() -> None:
    print(f"quietstar_kernels {__version__} · torch {torch.__version__} · Python {platform.python_version()}")
    print(cpu_library())
    print(cuda_library())
    print(cpu_products())


def device_name(device: str) -> str:
    return f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name(device)


def run_check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """The exit code."""
    has_gpu = torch.cuda.is_available()
    name = args.device or ("cuda" if has_gpu else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"--device must be a device such as cpu, cuda or cuda:1, got {name!r}")
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        parser.error(f"--device: PyTorch finds no {name} here")
    here = ["reference", *_dispatch.FASTEST_FIRST.get(device.type, ()), *OF_RECURRENT]
    wanted = [args.backend] if args.backend else here
    if args.backend and all(reasons := [self_test.why_not(op, args.backend, device) for op in args.op]):
        parser.error(f"--backend: {args.backend!r} is not available: {'; '.join(map(str, dict.fromkeys(reasons)))}")
    show_versions()
    if not has_gpu:
        print("PyTorch finds no GPU here: this checks what runs on the CPU.")
    print(f"\n{name} ({device_name(name)})")
    show_attention(device)
    return 0 if self_test.check(device, wanted, args.op) else 1


if __name__ == "__main__":
    sys.exit(main())
