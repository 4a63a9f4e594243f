"""Every experiment runs at its smallest size, and the page about it is written; what they measure is docs/experiments.md."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from quietstar import QuietStar, ThoughtConfig

FOLDER = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def scripts(monkeypatch):
    """Import a script of experiments/ by name, as the scripts import each other."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


def experiments():
    return sorted(path.stem for path in FOLDER.glob("*.py") if "\nTITLE = " in path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", experiments())
def test_it_runs_and_is_reported(scripts, tmp_path, name):
    run = scripts("run_experiments")
    run.run_one(name, 0, "tiny", tmp_path / "results")
    result = json.loads((tmp_path / "results/tiny" / name / "seed-0.json").read_text())
    page, _ = scripts("experiments_report").write({name: [result, {**result, "seed": 1}]}, "tiny", tmp_path / "page")
    text = page.read_text()
    assert f"## {scripts(name).TITLE}" in text and "| threshold |" in text
    for row in result["rows"]:
        assert f"| {row['run']} |" in text
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in page.parent.glob("*.png"))


def test_thresholds_hold_for_the_mean(scripts):
    checks = scripts("experiments_checks")
    assert checks.least("x", [0.1, 0.3], 0.2)["passed"] and not checks.least("x", [0.1, 0.29], 0.2)["passed"]
    assert checks.most("x", [0.1, 0.3], 0.2)["passed"] and not checks.most("x", [0.1, 0.31], 0.2)["passed"]
    missing = checks.least("x", [0.9, None], 0.2)
    assert not missing["passed"] and missing["value"] == 0.9
    assert math.isnan(checks.most("x", [None], 0.2)["value"]) and not checks.most("x", [None], 0.2)["passed"]


@pytest.mark.parametrize("preset", ["official", "paper"])
def test_digit_sums_are_measured_as_they_are_trained(scripts, monkeypatch, tmp_path, preset):
    """Every variant's loss and weight are those of the wrapper's forward, mixed as in its training."""
    digit_thoughts = scripts("digit_thoughts")
    sums = digit_thoughts.digit_sums
    config = ThoughtConfig(
        preset=preset, thoughts=4, thought_tokens=4, lookahead=1, embedding_scale=1, embedding_init=sums.DASH
    )
    qs = QuietStar(sums.new_model(0), config).eval()
    torch.nn.init.normal_(qs.mixing_head[-1].weight, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(digit_thoughts, "trained", lambda *arguments, **fields: qs)
    found = digit_thoughts.measure(qs.model, 0, "tiny", tmp_path)

    lines = sums.direct_lines(sums.split_strings(0)[1][: digit_thoughts.SIZES["tiny"]["lines"]])
    with torch.no_grad():
        out = qs(lines, anchors=torch.full((len(lines), 1), sums.AT_EQUALS))
    assert found["loss"] == pytest.approx(float(out.nll_mix.mean()), abs=1e-5)
    assert found["mixing_weight"] == pytest.approx(float(out.weight.mean()), abs=1e-5)


def test_what_is_done_is_not_run_again(scripts, tmp_path, monkeypatch, capsys):
    run = scripts("run_experiments")
    asked = []

    def start(name, seed, size, out):
        asked.append((name, seed))
        result = {"seed": seed, "rows": [{"run": "base", "accuracy": 0.5}], "seconds": 60}
        file = run.result_file(out, name, size, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result))
        return 0

    monkeypatch.setattr(run, "start", start)
    monkeypatch.setattr(scripts("star"), "check", lambda results: [])
    monkeypatch.delattr(scripts("star"), "plot")
    monkeypatch.setattr(sys, "argv", ["run_experiments.py", "star", "--out", str(tmp_path), "--seeds", "2"])
    assert run.main() == 0 and sorted(asked) == [("star", 0), ("star", 1)]
    run.result_file(tmp_path, "star", "quick", 1).unlink()
    assert run.main() == 0 and asked[2:] == [("star", 1)]
    text = (tmp_path / "quick/experiments.md").read_text()
    assert "| base | 0.500 ± 0.000 |" in text and "2 seeds, 1.0 minutes of a core each" in text
    assert set(run.CURVES) <= set(run.names())
    run.result_file(tmp_path, "star", "quick", 0).unlink()
    docs = tmp_path / "docs"
    monkeypatch.setattr(
        sys, "argv", ["run_experiments.py", "icot", "--seeds", "1", "--out", str(tmp_path), "--docs", str(docs)]
    )
    monkeypatch.setattr(scripts("icot"), "check", lambda results: [])
    monkeypatch.delattr(scripts("icot"), "plot")
    assert run.main() == 0 and asked[3:] == [("icot", 0)]
    text = (docs / "experiments.md").read_text()
    assert "## STaR" in text and "1 seed, 1.0" in text and "[Stepwise internalisation](#stepwise-internalisation)" in text
    monkeypatch.setattr(sys, "argv", ["run_experiments.py", "nothing"])
    with pytest.raises(SystemExit):
        run.main()
    assert "there is no experiment nothing" in capsys.readouterr().err
