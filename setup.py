"""What pyproject.toml can't say: the CUDA back end, one library compiled from csrc/ with nvcc and ninja.

QUIETSTAR_BUILD=auto    compile if nvcc, ninja and PyTorch are found, else install pure Python with a one-line notice (default)
QUIETSTAR_BUILD=cuda    compile, or stop with the reason
QUIETSTAR_BUILD=python  pure Python
TORCH_CUDA_ARCH_LIST    what to compile for, as PyTorch reads it; default ARCHITECTURES
CUDA_HOME               the toolkit, default that of the nvcc on PATH

pip builds in an isolated environment without PyTorch, unless it is called with --no-build-isolation.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = "8.0+PTX;9.0a;10.0;12.0"  # the PTX is for later GPUs
ERROR = re.compile(r"\b(error|fatal)\s*[:#]|undefined reference|cannot find", re.IGNORECASE)  # of compilers and linkers
OLDEST = 8  # compute capability of the first GPUs with the instructions that the kernels use
COMPILE = [
    "-std=c++17 -O3 --threads 2 -Xptxas=-v -Xfatbin=-compress-all -Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
    "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",  # one binary for PyTorch 2.10 and everything later
]
# Static, so that the import needs no CUDA. Without --no-as-needed libtorch.so goes, and with it the way to the CUDA stream.
LINK = "-shared -cudart=static -Xlinker=-s,--no-as-needed -ltorch_cpu -ltorch -lc10"


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def ninja() -> str | None:
    return shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))


def torch_folder() -> Path | None:
    found = importlib.util.find_spec("torch")
    return Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


def missing_for_cuda() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    if sys.platform != "linux":
        return f"the CUDA back end is for Linux, this is {sys.platform}"
    if not nvcc():
        return f"there is no nvcc in {os.environ['CUDA_HOME']}/bin" if "CUDA_HOME" in os.environ else "there is no nvcc on PATH"
    if not ninja():
        return "ninja is not installed"
    if not torch_folder():
        return "PyTorch can't be imported; where it is installed, --no-build-isolation lets pip see it"
    return None


def architectures() -> list[str]:
    """Names as nvcc has them: "sm_90a" is machine code, "compute_90" is PTX, which a driver compiles for later GPUs."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    names = []
    for word in re.split(r"[;,\s]+", listed.strip()):
        found = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", word)
        if not found:
            sys.exit(f"TORCH_CUDA_ARCH_LIST takes numbers such as {ARCHITECTURES!r}, got {word!r}.")
        if int(found[1]) >= OLDEST:
            names += [f"sm_{found[1]}{found[2]}"] + [f"compute_{found[1]}{found[2]}"] * bool(found[3])
    if not names:
        sys.exit(f"TORCH_CUDA_ARCH_LIST={listed!r} has nothing from {OLDEST}.0 on, which the kernels need.")
    return names


def ninja_file(sources: list[str], library: Path) -> str:
    """The sources to ``library``, linked twice: the first link tells which symbols are too new for manylinux_2_28."""
    torch = torch_folder()
    names = architectures()
    codes = [f"-gencode=arch={name.replace('sm_', 'compute_')},code={name}" for name in names]
    flags = [*COMPILE, f"-isystem {quoted(torch / 'include')}", f"-DQUIETSTAR_ARCHITECTURES='\"{' '.join(names)}\"'", *codes]
    objects = [f"{Path(source).name}.o" for source in sources]
    lines = [
        f"nvcc = {quoted(nvcc())}",
        f"compile_flags = {' '.join(flags)}",
        f"link_flags = -L{quoted(torch / 'lib')} {LINK}",
        "rule compile",
        "  command = $nvcc -c $in -o $out $compile_flags -MD -MF $out.d > $out.log 2>&1 || { cat $out.log; exit 1; }",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $nvcc $in -o $out $link_flags $more",
        "rule stand_ins",
        f"  command = {quoted(sys.executable)} {quoted(ROOT / 'csrc/old_glibc.py')} $in $out",
        *(f"build {name}: compile {escaped(ROOT / source)}" for name, source in zip(objects, sources, strict=True)),
        f"build first.so: link {' '.join(objects)}",
        "build stand_ins.txt: stand_ins first.so",
        f"build {escaped(library)}: link {' '.join(objects)} | stand_ins.txt",
        "  more = --options-file stand_ins.txt",
        f"default {escaped(library)}",
    ]
    return "\n".join(lines) + "\n"


def quoted(path: Path | str) -> str:
    """In a command of a ninja file."""
    return shlex.quote(str(path)).replace("$", "$$")


def escaped(path: Path) -> str:
    """Among the inputs and outputs of a ninja file."""
    return re.sub(r"([$ :])", r"$\1", str(path))


class BuildExt(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".abi3.so"  # whatever the Python that builds

    def build_extension(self, ext: Extension) -> None:
        library, folder = Path(self.get_ext_fullpath(ext.name)).resolve(), Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(ext.sources, library))
        compile_all([ninja(), "-C", str(folder)], verbose=self.verbose > 0)


def compile_all(command: list[str], verbose: bool) -> None:
    """Run ninja; where it fails, stop with what the compiler said and, in the last line, its first error."""
    said = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as running:
        for line in running.stdout:
            said.append(line)
            if verbose:
                print(line, end="", flush=True)
    if running.returncode:
        hidden = [] if verbose else [line for line in said if not re.match(r"\[\d+/\d+\] ", line)]
        first = next((line.strip() for line in said if ERROR.search(line)), "the lines above say why")
        sys.exit(f"{''.join(hidden)}The CUDA back end does not compile: {first}; QUIETSTAR_BUILD=python installs without it.")


class BuildPy(build_py):
    def run(self) -> None:
        if lacking and wanted == "auto":
            print(f"quietstar-kernels is installed without its CUDA back end: {lacking}.", file=sys.stderr)
        super().run()


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """The library has no Python symbol: one wheel serves all of Python."""
        return ("py3", "none", super().get_tag()[2])


wanted = os.environ.get("QUIETSTAR_BUILD", "auto")
if wanted not in ("auto", "cuda", "python"):
    sys.exit(f"QUIETSTAR_BUILD must be auto, cuda or python, got {wanted!r}.")
lacking = None if wanted == "python" else missing_for_cuda()
if wanted == "cuda" and lacking:
    sys.exit(f"QUIETSTAR_BUILD=cuda: {lacking}.")
compiled = wanted != "python" and not lacking

sources = sorted(str(path.relative_to(ROOT)) for pattern in ("*.cpp", "*.cu") for path in (ROOT / "csrc").glob(pattern))
setup(
    ext_modules=[Extension("quietstar_kernels.cuda._C", sources)] if compiled else [],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy, "bdist_wheel": Wheel},
)
