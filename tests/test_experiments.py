"""Every experiment runs at its smallest size, and its page is written; what they measure is in docs/recipe-results.md."""

import json
import sys
from pathlib import Path

import pytest
import torch

from quietstar import QuietStar, ThoughtConfig

FOLDER = Path(__file__).parents[1] / "experiments"


def experiments():
    return sorted(path.stem for path in FOLDER.glob("*.py") if "\nTITLE = " in path.read_text())


@pytest.mark.long
@pytest.mark.parametrize("name", experiments())
def test_it_runs_and_is_reported(scripts, tmp_path, name):
    run = scripts("run_experiments")
    run.run_one(name, 0, "tiny", tmp_path / "results")
    result = json.loads((tmp_path / "results/tiny" / name / "seed-0.json").read_text())
    assert {"seed", "date", "seconds", "versions", "machine"} <= result.keys()
    both = {name: [result, {**result, "seed": 1}]}
    page = scripts("experiments_report").write({"tiny": both, "fresh": both, "full": both}, tmp_path / "page")
    text = page.read_text()
    assert f"### {scripts(name).TITLE}\n" in text and f"[{scripts(name).TITLE}](experiments_{name}_full.png)" in text
    assert all(text.count(f"| {claim.text} |") == 1 for claim in getattr(scripts(name), "CLAIMS", ()))
    for row in result["rows"] if hasattr(scripts(name), "CLAIMS") else ():
        assert f"| {row['run']} |" in text
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in page.parent.glob("*.png"))


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


def test_what_the_seeds_say_about_a_claim(scripts):
    """Gaps are taken seed by seed, and the control that speaks most against a claim decides."""
    claims = scripts("experiments_claims")
    ours, controls = (3.0, 5.0, 7.0), {"level": (3.1, 4.9, 7.0), "below": (1.0, 2.9, 5.1), "above": (4.0, 6.1, 8.0)}
    results = [
        {"rows": [{"run": "ours", "x": x}, *({"run": name, "x": values[i], "y": x} for name, values in controls.items())]}
        for i, x in enumerate(ours)
    ]

    def found(*names, **options):
        return claims.hardest(claims.Claim("", "ours", names, "x", **options), results)

    below, level, above = found("below"), found("below", "level"), found("below", "level", "above")
    assert below.values == pytest.approx([2, 2.1, 1.9]) and below.state == "holds"
    assert level.control == "level" and level.state == "not resolved"
    assert above.control == "above" and above.state == "no" and above.theirs == [4.0, 6.1, 8.0]
    other = found("below", ("below", "y"))
    assert other.control == "below, y" and other.state == "not resolved"
    assert found("above", less=True).state == "holds" and found().state == "holds" and found().control == ""
    single = claims.hardest(claims.Claim("", "ours", ("below",), "x"), results[:1])
    assert single.state == "not resolved"
    results[0]["rows"][0]["x"] = None
    assert found("below").state == "not resolved"
    assert claims.margin([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / 3**0.5, abs=1e-3)


def test_what_follows_a_wrong_attempt(scripts, monkeypatch):
    score = scripts("score")
    monkeypatch.setattr(score, "PAIRS_EACH", 3)
    # Two problems, three pairs of attempts at each: problem by problem, first and second are 1 0 0 and 0 1 0, 0 0 0 and 0 0 1.
    rewards = torch.tensor([[1.0, 0, 0, 0, 0, 0], [0.0, 0, 1, 0, 0, 1]])
    assert score.after_wrong(rewards) == pytest.approx({"mended": 2 / 5, "another_first": 1 / 5})
    assert score.after_wrong(torch.ones(2, 6)) == {"mended": None, "another_first": None}


def recorded(run, asked):
    """In place of a process, which notes what it was asked for and writes a result."""

    def start(name, seed, size, out):
        asked.append((name, seed))
        result = {"seed": seed, "rows": [{"run": "base", "accuracy": 0.5}], "seconds": 60}
        file = run.result_file(out, name, size, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result))
        return 0

    return start


def test_what_is_done_is_not_run_again(scripts, tmp_path, monkeypatch, capsys):
    run = scripts("run_experiments")
    asked = []
    monkeypatch.setattr(run, "start", recorded(run, asked))
    for name in ("star", "icot"):
        monkeypatch.setattr(scripts(name), "CLAIMS", (), raising=False)
        monkeypatch.delattr(scripts(name), "plot")
    arguments = ["run_experiments.py", "--out", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs")]

    def main(*more):
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        return run.main()

    assert main("star", "--seeds", "2") == 0 and sorted(asked) == [("star", 0), ("star", 1)]
    run.result_file(tmp_path / "runs", "star", "quick", 1).unlink()
    assert main("star", "--seeds", "2") == 0 and asked[2:] == [("star", 1)]
    page, stored = tmp_path / "docs/recipe-results.md", tmp_path / "docs/experiments.json"
    assert "| base | 0.500 ± 0.000 |" in page.read_text() and "2 seeds from 0, 1.0 minutes of a core each" in page.read_text()
    assert [result["seed"] for result in json.loads(stored.read_text())["quick"]["star"]] == [0, 1]

    # What stands on the page stays there when something else is run elsewhere.
    arguments[2] = str(tmp_path / "other")
    assert main("icot", "--seeds", "1") == 0 and asked[3:] == [("icot", 0)]
    text = page.read_text()
    assert "## STaR" in text and "1 seed from 0, 1.0" in text and f"## {scripts('icot').TITLE}" in text
    page.write_text(f"# Results\n{text}after\n")
    assert main("--seeds", "0") == 0 and page.read_text() == f"# Results\n{text}after\n"
    page.unlink()
    assert main("--seeds", "0") == 0 and page.read_text() == text and len(asked) == 4

    # Fresh seeds stand beside the others.
    assert main("star", "--fresh") == 0 and sorted(asked[4:]) == [("star", seed) for seed in range(100, 105)]
    stored = json.loads((tmp_path / "docs/experiments.json").read_text())
    assert len(stored["fresh"]["star"]) == 5 and len(stored["quick"]["star"]) == 2
    assert set(run.CURVES) <= set(run.names())
    with pytest.raises(SystemExit):
        main("nothing")
    assert "there is no experiment nothing" in capsys.readouterr().err
