"""The kernels hub's copy of the package, loaded by ``kernels`` from a folder, works beside the installed one."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import hub_kernels

import quietstar
import quietstar_kernels
from quietstar_kernels.testing import attention_inputs, random_layout
from tests.quietstar.conftest import make_model

kernels = pytest.importorskip("kernels")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "hub"))
from build import DEVICES, build  # noqa: E402

sys.path.pop(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    to = tmp_path_factory.mktemp("hub")
    build(to)
    return to


@pytest.mark.parametrize("name", ["thesis.tex", "docs/thesis.tex", "build/torch-cpu/mine.py", "build/mine/x", ".git/HEAD"])
def test_what_is_in_a_folder_stays(tmp_path, name):
    """A folder that holds anything else is refused; a build is replaced."""
    build(tmp_path / "built")
    build(tmp_path / "built")
    for to in (tmp_path / "new", tmp_path / "built"):
        mine = to / name
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text("mine")
        with pytest.raises(ValueError, match=f"{to}: it holds other things than what this script writes"):
            build(to)
        assert mine.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["built", "new"]


@pytest.fixture(scope="module")
def loaded(folder):
    return kernels.get_local_kernel(folder, backend="cpu")


def test_results_are_those_of_the_installed_package(loaded):
    assert loaded.ThoughtLayout is not quietstar_kernels.ThoughtLayout and loaded.__name__.startswith("_quietstar_kernels_cpu_")
    layout = random_layout(torch.Generator().manual_seed(0), "ragged")
    inputs = attention_inputs(torch.Generator().manual_seed(1), layout)
    copied = loaded.ThoughtLayout.at(layout.anchor, layout.N, layout.S, lo=layout.lo, length=layout.length)
    for backend in ("reference", "cpu"):
        got = loaded.thought_attention(**inputs, layout=copied, backend=backend)
        want = quietstar_kernels.thought_attention(**inputs, layout=layout, backend=backend)
        torch.testing.assert_close(got, want)


def test_versions_side_by_side_have_operators_of_their_own(folder, loaded, tmp_path):
    build(tmp_path)
    changed = tmp_path / "build/torch-cpu"
    (changed / "reference.py").write_text((changed / "reference.py").read_text() + "\n# another version\n")
    metadata = json.loads((changed / "metadata.json").read_text())
    (changed / "metadata.json").write_text(json.dumps(metadata | {"id": metadata["id"] + "_2"}))
    other = kernels.get_local_kernel(tmp_path, backend="cpu")
    hidden, weight, targets = torch.randn(3, 8), torch.randn(50, 8), torch.tensor([1, 2, 3])
    results = [x.linear_logprob(hidden, weight, targets) for x in (loaded, other, quietstar_kernels)]
    assert other is not loaded and len({x.__name__ for x in (loaded, other, quietstar_kernels)}) == 3
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], results[2])


def test_every_device_has_the_same_files_and_none_is_compiled(tmp_path):
    build(tmp_path)
    files = {device: sorted(path.name for path in (tmp_path / f"build/torch-{device}").rglob("*")) for device in DEVICES}
    assert files["cpu"] == files["cuda"] == files["rocm"] and not any(name.endswith((".so", ".pyc")) for name in files["cpu"])
    sources = [path.read_text() for path in (tmp_path / "build/torch-cpu").rglob("*.py")]
    assert not any("from quietstar_kernels" in text or "import quietstar_kernels" in text for text in sources)


def test_attention_of_a_transformers_model(loaded, monkeypatch, tmp_path):
    """As transformers takes it from the hub, which needs a release of ``kernels`` that accepts its own; here only the download
    is replaced.
    """
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_attn_kernel_version", lambda _: 1, raising=False)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *_, **__: loaded)
    name = "someone/quietstar-kernels"
    for architecture in ("qwen3", "gemma2"):
        make_model(architecture).save_pretrained(tmp_path / architecture)
        ids, results = torch.randint(3, 61, (2, 9)), []
        for attention, package in ((name, loaded), (quietstar.register_attention(), quietstar_kernels)):
            model = AutoModelForCausalLM.from_pretrained(tmp_path / architecture, attn_implementation=attention)
            layout = package.ThoughtLayout.every_position(2, 9, 1, 3)
            packed = layout.token_ids(ids, ids[..., None, None], 4, 5, 0)
            with torch.no_grad():
                options = {"position_ids": layout.position_ids(), "thought_layout": layout, "use_cache": False}
                results.append(model(packed, **options).logits)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen3", attn_implementation=name)
    with pytest.raises(ValueError, match="pass thought_layout="):
        model(ids)
    with pytest.raises(ValueError, match="passes position_bias"):
        layout = loaded.ThoughtLayout.every_position(2, 9, 1, 3)
        rows = torch.randn(2, 2, layout.M, 8)
        loaded.flash_attn_forward(model, rows, rows, rows, None, thought_layout=layout, position_bias=rows)
