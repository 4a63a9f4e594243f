"""Lets a library that is linked here load with glibc 2.28, as the tag manylinux_2_28 promises.

    python old_glibc.py LIBRARY FLAGS

glibc 2.34 moved the functions of libpthread, libdl and librt to libc.so.6. A program that is linked against it requires their
version GLIBC_2.34, which an older glibc doesn't have, although newer ones still have the old versions too. So this writes empty
libraries with the three old names, which define the old version of everything that LIBRARY needs, and writes the options of
nvcc or c++ that link with them to FLAGS. FLAGS stays empty on an older glibc, which needs nothing, and on processors other than
x86-64, where the old versions have other names.
"""

import platform
import re
import subprocess
import sys
from pathlib import Path

# The old libraries and how the names in them begin; and, on x86-64, the first version of everything in them.
HOMES = {"libdl.so.2": "dl", "librt.so.1": "shm_", "libpthread.so.0": ""}
FIRST = "GLIBC_2.2.5"
LATER = {"dlmopen": "GLIBC_2.3.4", "pthread_setname_np": "GLIBC_2.12", "pthread_getname_np": "GLIBC_2.12"}


def main(library: Path, flags: Path) -> None:
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True).stdout
    missed = dict(re.findall(r"(\w+)@(GLIBC_[\d.]+)$", listed, re.MULTILINE)) if platform.machine() == "x86_64" else {}
    folder = flags.with_suffix("")
    folder.mkdir(exist_ok=True)
    options = []
    left = sorted(name for name, version in missed.items() if version == "GLIBC_2.34")
    for home, beginning in HOMES.items():
        here = [name for name in left if name.startswith(beginning)]
        left = [name for name in left if name not in here]
        if here:
            options.append(f"-Xlinker {stand_in(folder / home, here)}")
    if "__libc_single_threaded" in missed:  # since 2.32, for std::shared_ptr; "no" is always a correct answer
        options.append(str(one_variable(folder)))
    flags.write_text("\n".join(options) + "\n")


def stand_in(library: Path, names: list[str]) -> Path:
    versions: dict[str, list[str]] = {}
    for name in names:
        versions.setdefault(LATER.get(name, FIRST), []).append(name)
    source, script = library.with_suffix(".c"), library.with_suffix(".map")
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
    script.write_text("".join(f"{version} {{ global: {'; '.join(here)}; }};\n" for version, here in versions.items()))
    linker = f"-Wl,-soname,{library.name},--version-script,{script}"
    subprocess.run(["cc", "-shared", "-fPIC", "-nostdlib", "-fno-builtin", linker, source, "-o", library], check=True)
    return library


def one_variable(folder: Path) -> Path:
    source, compiled = folder / "single_threaded.c", folder / "single_threaded.o"
    source.write_text('__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;\n')
    subprocess.run(["cc", "-c", "-fPIC", source, "-o", compiled], check=True)
    return compiled


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
