"""The demo runs end to end in seconds and writes the files that it promises."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from quietstar import QuietStar

SCRIPT = Path(__file__).parents[2] / "examples" / "english.py"


@pytest.fixture
def english():
    spec = importlib.util.spec_from_file_location("english", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo(english, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(english, "LENGTH", 32)
    monkeypatch.setattr(english, "HELD_OUT", 16)
    monkeypatch.setattr("sys.argv", ["english.py", "--seconds-lm=2", "--seconds-thoughts=2", f"--out={tmp_path}"])
    english.main()

    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {entry["phase"] for entry in entries} == {"lm", "thoughts", "held_out", "speed"}
    assert all(math.isfinite(value) for entry in entries for name, value in entry.items() if name != "phase")
    assert entries[-1]["same"] > 0.99
    assert QuietStar.from_pretrained(tmp_path / "checkpoint").thought_config == english.THOUGHTS
    assert "Thoughts on a held-out text" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert (tmp_path / "losses.png").stat().st_size > 0


def test_paragraphs_are_in_one_part_only(english) -> None:
    parts = english.paragraphs(seed=0)
    assert [len(part) for part in parts[1:]] == [english.NEW, english.HELD_OUT]
    assert sum(map(len, parts)) == len(set().union(*parts))
