"""What pyproject.toml can't say: two libraries compiled from csrc/ with ninja, one for CPUs and one, with nvcc, for GPUs.

QUIETSTAR_BUILD=auto    compile what the tools found here can compile, and say in a line what is left out (default)
QUIETSTAR_BUILD=cpu     compile the library for CPUs alone, or stop with the reason
QUIETSTAR_BUILD=cuda    compile both, or stop with the reason
QUIETSTAR_BUILD=python  pure Python
CXX                     the C++ compiler of the library for CPUs; default c++
TORCH_CUDA_ARCH_LIST    what GPUs to compile for, as PyTorch reads it; default ARCHITECTURES
CUDA_HOME               the toolkit, default that of the nvcc on PATH

pip builds in an isolated environment without PyTorch, unless it is called with --no-build-isolation.
"""

import importlib.util
import os
import platform
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
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = "8.0+PTX;9.0a;10.0;12.0"  # the PTX is for later GPUs
# The instruction sets of processors that csrc/cpu/ is compiled for; the library chooses one when it is loaded.
SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    SETS["avx512"] = [*SETS["avx2"], *(f"-mavx512{part}" for part in ("f", "dq", "bw", "vl")), "-mprefer-vector-width=512"]
    SETS["avx512_bf16"] = [*SETS["avx512"], "-mavx512bf16"]
ERROR = re.compile(r"\b(error|fatal)\s*[:#]|undefined reference|cannot find", re.IGNORECASE)  # of compilers and linkers
OLDEST = 8  # compute capability of the first GPUs with the instructions that the kernels use
STABLE = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"  # one binary for PyTorch 2.10 and everything later
COMPILE_CUDA = "-std=c++17 -O3 --threads 2 -Xptxas=-v -Xfatbin=-compress-all -Xcompiler=-fPIC,-fvisibility=hidden,-Wall"
COMPILE_CPU = "-std=c++17 -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -fPIC -fvisibility=hidden -Wall -Wno-psabi"
# CUDA's runtime is static, so that the import needs no CUDA. Without --no-as-needed libtorch.so goes, and with it the way to
# the CUDA stream.
LINK_CUDA = "-shared -cudart=static -Xlinker=-s,--no-as-needed -ltorch_cpu -ltorch -lc10"
LINK_CPU = "-shared -Wl,-s,--no-as-needed -ltorch_cpu -ltorch -lc10"


def package_page() -> str:
    """README.md for PyPI, which has no files beside it: links and pictures lead to the repository, at this version's tag."""
    found = {
        name: re.search(rf'^{name} = "(.*)"', (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)[1]
        for name, file in (("Repository", "pyproject.toml"), ("__version__", "quietstar_kernels/__init__.py"))
    }
    at = f"{found['Repository']}/{{}}/v{found['__version__']}/"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for begin, kind in ((r'src="', "raw"), (r"!\[[^]]*\]\(", "raw"), (r"(?<!!)\[[^]]*\]\(", "blob")):
        text = re.sub(rf"({begin})(?!https?:|#)", rf"\1{at.format(kind)}", text)
    return text


def cxx() -> str | None:
    return shutil.which(os.environ.get("CXX") or "c++")


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def ninja() -> str | None:
    return shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))


def torch_folder() -> Path | None:
    found = importlib.util.find_spec("torch")
    return Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


def missing_for_both() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    if sys.platform != "linux":
        return f"it is for Linux, this is {sys.platform}"
    if not ninja():
        return "ninja is not installed"
    if not torch_folder():
        return "PyTorch can't be imported; where it is installed, --no-build-isolation lets pip see it"
    return None


def missing_for_cpu() -> str | None:
    if not cxx():
        return f"there is no {os.environ.get('CXX') or 'c++'} on PATH"
    return missing_for_both()


def missing_for_cuda() -> str | None:
    if not nvcc():
        return f"there is no nvcc in {os.environ['CUDA_HOME']}/bin" if "CUDA_HOME" in os.environ else "there is no nvcc on PATH"
    return missing_for_both()


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


def cuda_ninja_file(sources: list[str], library: Path) -> str:
    names = architectures()
    codes = [f"-gencode=arch={name.replace('sm_', 'compute_')},code={name}" for name in names]
    built_for = f"-DQUIETSTAR_ARCHITECTURES='\"{' '.join(names)}\"'"
    flags = " ".join([COMPILE_CUDA, built_for, *codes])
    return ninja_file(nvcc(), {f"{Path(source).name}.o": (source, flags) for source in sources}, LINK_CUDA, library)


def known_sets(compiler: str) -> dict[str, list[str]]:
    """Of ``SETS``, those that a compiler knows: GCC has products of bf16 from 11 on."""
    program = 'int main() { return __builtin_cpu_supports("avx512bf16"); }'
    command = [compiler, *SETS.get("avx512_bf16", []), "-fsyntax-only", "-xc++", "-"]
    known = subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0
    return {name: flags for name, flags in SETS.items() if known or name != "avx512_bf16"}


def cpu_ninja_file(sources: list[str], library: Path) -> str:
    """kernels.cpp is compiled once for each instruction set, in a namespace of its name."""
    objects, sets = {}, known_sets(cxx())
    has_bf16 = ["-DQUIETSTAR_BF16"] * ("avx512_bf16" in sets)
    for source in sources:
        if Path(source).name == "kernels.cpp":
            for name, flags in sets.items():
                objects[f"{name}.o"] = (source, " ".join([COMPILE_CPU, f"-DQUIETSTAR_SET={name}", *flags]))
        else:
            objects[f"{Path(source).name}.o"] = (source, " ".join([COMPILE_CPU, *has_bf16]))
    return ninja_file(cxx(), objects, LINK_CPU, library)


def ninja_file(compiler: str, objects: dict[str, tuple[str, str]], link: str, library: Path) -> str:
    """Objects, with their sources and flags, to ``library``; linked twice: the first link tells which symbols are too new for
    manylinux_2_28."""
    torch = torch_folder()
    lines = [
        f"compiler = {quoted(compiler)}",
        f"common = {STABLE} -isystem {quoted(torch / 'include')}",
        f"link_flags = -L{quoted(torch / 'lib')} {link}",
        "rule compile",
        "  command = $compiler -c $in -o $out $common $flags -MD -MF $out.d > $out.log 2>&1 || { cat $out.log; exit 1; }",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $compiler $in -o $out $link_flags $more",
        "rule stand_ins",
        f"  command = {quoted(sys.executable)} {quoted(ROOT / 'csrc/old_glibc.py')} $in $out",
    ]
    for name, (source, flags) in objects.items():
        lines += [f"build {name}: compile {escaped(ROOT / source)}", f"  flags = {flags}"]
    lines += [
        f"build first.so: link {' '.join(objects)}",
        "build stand_ins.txt: stand_ins first.so",
        f"build {escaped(library)}: link {' '.join(objects)} | stand_ins.txt",
        "  more = $$(cat stand_ins.txt)",
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
        backend = ext.name.split(".")[-2]
        library, folder = Path(self.get_ext_fullpath(ext.name)).resolve(), Path(self.build_temp).resolve() / backend
        folder.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        write = {"cpu": cpu_ninja_file, "cuda": cuda_ninja_file}[backend]
        (folder / "build.ninja").write_text(write(ext.sources, library))
        compile_all([ninja(), "-C", str(folder)], BACKENDS[backend], verbose=self.verbose > 0)


def compile_all(command: list[str], what: str, verbose: bool) -> None:
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
        sys.exit(f"{''.join(hidden)}The {what} does not compile: {first}; QUIETSTAR_BUILD=python installs without it.")


class BuildPy(build_py):
    def run(self) -> None:
        for backend, reason in lacking.items():
            if reason and wanted == "auto":
                print(f"quietstar-kernels is installed without its {BACKENDS[backend]}: {reason}.", file=sys.stderr)
        super().run()


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """The library has no Python symbol: one wheel serves all of Python."""
        return ("py3", "none", super().get_tag()[2])


class Editable(editable_wheel):
    """A .pth file with both folders of packages. Of the finder that setuptools writes for two, type checkers see nothing; its
    strict mode sees no new files; its compat mode knows one folder."""

    def _select_strategy(self, name: str, tag: str, build_lib: str) -> object:
        try:
            from setuptools.command.editable_wheel import _StaticPth
        except ImportError:  # a later setuptools: its own finder, which only checkers don't see
            return super()._select_strategy(name, tag, build_lib)
        return _StaticPth(self.distribution, name, [ROOT, ROOT / "python"])


BACKENDS = {"cpu": "CPU library", "cuda": "CUDA back end"}
NEEDED = {"auto": [], "cpu": ["cpu"], "cuda": ["cpu", "cuda"], "python": []}

wanted = os.environ.get("QUIETSTAR_BUILD", "auto")
if wanted not in NEEDED:
    sys.exit(f"QUIETSTAR_BUILD must be auto, cpu, cuda or python, got {wanted!r}.")
lacking = {"cpu": missing_for_cpu(), "cuda": missing_for_cuda()}
for backend in NEEDED[wanted]:
    if lacking[backend]:
        sys.exit(f"QUIETSTAR_BUILD={wanted}: {lacking[backend]}.")
compiled = [name for name in lacking if not lacking[name]] if wanted == "auto" else NEEDED[wanted]


def sources(backend: str) -> list[str]:
    folder, patterns = (ROOT / "csrc/cpu", ["*.cpp"]) if backend == "cpu" else (ROOT / "csrc", ["*.cpp", "*.cu"])
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in folder.glob(pattern))


if __name__ == "__main__":  # the tests read what is above
    setup(
        ext_modules=[Extension(f"quietstar_kernels.{backend}._C", sources(backend)) for backend in compiled],
        cmdclass={"build_ext": BuildExt, "build_py": BuildPy, "bdist_wheel": Wheel, "editable_wheel": Editable},
        long_description=package_page(),
        long_description_content_type="text/markdown",
    )
