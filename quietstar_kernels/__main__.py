"""``python -m quietstar_kernels``: versions, and which back end serves which op on this machine."""

from __future__ import annotations

import platform

import torch

from quietstar_kernels import __version__, backends, cuda_library


def main() -> None:
    print(f"quietstar_kernels {__version__} · torch {torch.__version__} · Python {platform.python_version()}")
    print(cuda_library())
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in devices:
        name = torch.cuda.get_device_name(device) if device != "cpu" else f"{torch.get_num_threads()} threads"
        print(f"\n{device} ({name})")
        for row in backends(device):
            print(f"  {row['op']:<18} {row['backend']:<10} {row['status']}")


if __name__ == "__main__":
    main()
