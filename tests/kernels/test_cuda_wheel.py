"""The CUDA wheel: compiles for every architecture without spills, and works without a compiler, CUDA or a GPU."""

import json
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from cuda_wheel import ROOT, bare_python, run, wheel

pytestmark = pytest.mark.build
ARCHITECTURES = ["sm_80", "sm_90a", "sm_100", "sm_120"]
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<target>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.fixture
def library(tmp_path):
    """``library("cuda")`` is the file of a back end's library."""

    def unpack(backend):
        with zipfile.ZipFile(wheel()) as archive:
            return archive.extract(f"quietstar_kernels/{backend}/_C.abi3.so", tmp_path)

    return unpack


def test_nothing_spills(record_property):
    assert wheel()
    logs = list((ROOT / "build/wheel/build").glob("temp*/cuda/*.log"))
    text = "\n".join(path.read_text() for path in logs)
    assert "warning" not in text
    entries = [match.groupdict() for match in ENTRY.finditer(text)]
    assert entries and len(entries) == text.count("Compiling entry function")
    names = sorted({entry["name"] for entry in entries})
    readable = dict(zip(names, run(["c++filt", *names], ROOT).splitlines(), strict=True))
    cells = {(entry["name"], entry["target"]): entry["registers"] + spilled(entry) for entry in entries}
    assert {*cells} == {(name, target) for name in names for target in ARCHITECTURES}
    lines = ["csrc/ by nvcc: registers a thread, and bytes of spills and stack where there are any"]
    lines.append(" " * 48 + "".join(f"{target:>10}" for target in ARCHITECTURES))
    for name in names:
        short = re.sub(r"^void |quietstar::|\([^()]*\)$", "", readable[name]).replace("> >", ">>")
        lines.append(f"  {short:<46}" + "".join(f"{cells[name, target]:>10}" for target in ARCHITECTURES))
    record_property("table", "\n".join(lines))  # tests/conftest.py prints it at the end
    assert not [f"{readable[entry['name']]} on {entry['target']}{spilled(entry)}" for entry in entries if spilled(entry)]


def spilled(entry):
    """ "+8+8+8", stack frame, stores and loads, or nothing."""
    found = [entry["stack"], entry["stores"], entry["loads"]]
    return "" if found == ["0", "0", "0"] else f"+{'+'.join(found)}"


def test_one_wheel_for_all_of_python(tmp_path):
    assert re.fullmatch(r"quietstar_kernels-[\d.]+-py3-none-manylinux_2_28_x86_64\.whl", wheel().name)
    with zipfile.ZipFile(wheel()) as archive:
        names = archive.namelist()
        libraries = {f"quietstar_kernels/{backend}/_C.abi3.so" for backend in ("cpu", "cuda")}
        assert {name for name in names if name.endswith(".so")} == libraries  # no library of PyTorch or CUDA was packed with it
        assert wheel().stat().st_size < 5e6
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    assert "Requires-Python: >=3.10" in metadata and "Requires-Dist: torch>=2.10" in metadata
    assert {"quietstar_kernels/__init__.py", "quietstar/__init__.py", "quietstar/explanation/assets/explain.js"} <= {*names}


def test_source_distribution_has_what_a_build_needs():
    """The wheel was built from what is in it, and from nothing else, without an index to fetch from."""
    (archive,) = wheel().parent.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources <= names and not any(name.endswith(".so") for name in names)


def test_what_the_library_needs(library):
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run(["readelf", "-d", library("cuda")], ROOT))
    assert "libtorch.so" in needed  # through it PyTorch's CUDA stream is found
    assert not any(re.match("libcuda|libcudart|libpython|libtorch_python|libtorch_cuda", name) for name in needed)
    symbols = run(["nm", "-D", "--defined-only", library("cuda")], ROOT)
    assert re.findall(r" T (quietstar_\w+)", symbols) == ["quietstar_built_for", "quietstar_cuda_error"]
    undefined = run(["nm", "-D", "--undefined-only", library("cuda")], ROOT)
    assert "w aoti_torch_get_current_cuda_stream" in undefined  # weak: PyTorch for CPUs doesn't have it
    assert not re.search(r" U (_ZN?K?2?at|_ZN?K?3c10|_?Py)", undefined)  # only the C interface of PyTorch


def test_what_the_cpu_library_needs(library):
    symbols = run(["nm", "-D", "--defined-only", library("cpu")], ROOT)
    assert re.findall(r" T (\w+)", symbols) == ["quietstar_cpu_kernels"]
    undefined = run(["nm", "-D", "--undefined-only", library("cpu")], ROOT)
    assert " U torch_parallel_for" in undefined
    assert not re.search(r" U (_ZN?K?2?at|_ZN?K?3c10|_?Py|GOMP|omp_)", undefined)  # only the C interface of PyTorch


HERE = """
import json
import torch
import quietstar_kernels
from quietstar_kernels import backends, cuda_library, sample_token, thought_decode
from quietstar_kernels.cuda import _library
from quietstar_kernels.testing import decode_inputs, random_layout, sample_inputs

said = {"file": quietstar_kernels.__file__, "library": cuda_library(), "private": {}}
ops = _library.ops()
for name in ("thought_decode", "sample_token"):
    schema = getattr(ops, f"_{name}_cuda").default._schema
    said["private"][name] = [(x.name, str(x.type), x.is_write) for x in schema.arguments]
    made = {"Tensor": torch.ones(2, 2, 2, 2, 2), "Optional[Tensor]": None, "float": 1.0, "int": 1}
    try:
        getattr(ops, f"_{name}_cuda")(*(made[str(x.type)] for x in schema.arguments))
    except RuntimeError as error:
        said["private"][name].append(str(error))
generator = torch.Generator().manual_seed(0)
layout = random_layout(generator, "ragged")
inputs = decode_inputs(generator, layout)
hidden = sample_inputs(generator, 3)
calls = {
    "thought_decode": lambda backend: thought_decode(**inputs, layout=layout, step=0, backend=backend),
    "sample_token": lambda backend: sample_token(**hidden, seed=0, backend=backend)[1],
}
said["errors"], said["difference"] = {}, {}
for op, call in calls.items():
    said["difference"][op] = float((call("cpu") - call("reference")).abs().max())
    assert torch.equal(call("auto"), call("cpu"))
    try:
        call("cuda")
    except ValueError as error:
        said["errors"][op] = str(error)
print(json.dumps(said))
"""


def test_where_there_is_no_compiler_and_no_gpu(tmp_path):
    said = json.loads(bare_python("-c", HERE, folder=tmp_path))
    assert said["file"].startswith(str(tmp_path / "bare"))
    for op in ("thought_decode", "sample_token"):
        expected = f"{op}: backend 'cuda' is not available: no CUDA device: these tensors are on cpu"
        assert said["errors"][op] == expected
        assert said["difference"][op] < 1e-4
    assert re.fullmatch(
        r"CUDA library /.*/bare/.*/_C\.abi3\.so, built with CUDA \d+\.\d+ for sm_80, compute_80, sm_90a, sm_100, sm_120",
        said["library"],
    )
    for op, (*arguments, error) in said["private"].items():
        assert arguments == parameters(op)
        assert error == "no CUDA device: these tensors are not on one"  # the call came through PyTorch to our code


def parameters(op):
    """The arguments of the C++ function in PyTorch's schema: name, type, and whether it is written to."""
    types = {"Tensor": "Tensor", "MaybeTensor": "Optional[Tensor]", "double": "float", "int64_t": "int"}
    source = (ROOT / "csrc/arguments.cuh").read_text()
    signature, body = re.search(rf"void call_{op}\((.*?)\) \{{\n(.*?)\n}}", source, re.DOTALL).groups()
    words = [re.fullmatch(r"(?:const )?(\w+)&? (\w+)", " ".join(word.split())).groups() for word in signature.split(",")]
    return [[name, types[kind], f"From::write({name})" in body] for kind, name in words]
