"""``quietstar eval``: the same losses as at the end of training, and the texts of another file."""

import json

import pytest

from quietstar.evaluation.intervals import verdict


def test_eval(home, quietstar, trained):
    metrics = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    code, out, _ = quietstar("eval", "--model=run", "--out=eval.json")
    figures = json.loads((home / "eval.json").read_text())
    assert code == 0 and f"{figures['base']:.4f}" in out
    everywhere = figures["by_anchor_choice"][0]
    assert everywhere["tokens"] == figures["tokens"] and f"{everywhere['gain_of_all']:+.4f}" in out
    names = ("base", "mixed", "another", "gain", "mixing", "content", "content_low")
    assert {name: metrics[-1][f"eval_{name}"] for name in names} == pytest.approx(
        {name: figures[name] for name in names}, abs=1e-6
    )
    parts = {"gain from thoughts": "gain", "= mixing, any thought": "mixing", "+ content, what was thought": "content"}
    for words, name in parts.items():
        interval = f"({figures[f'{name}_low']:+.4f} to {figures[f'{name}_high']:+.4f})"
        assert f"{words} {figures[name]:+.4f} {interval}" in " ".join(out.split())
    assert verdict(figures) in out and "content" in everywhere and "content" in figures["by_difficulty"]["base"][0]
    quietstar("eval", "--model=run", "--all", "--out=eval.json")
    assert json.loads((home / "eval.json").read_text())["texts"] == 40
