"""JSON with a row a line, and the marked parts of pages."""

import json
from pathlib import Path

import pytest

from benchmarks.report.committed import as_json, with_block

ROOT = Path(__file__).parents[2]
COMMITTED = [ROOT / "docs/digit_sums.json", ROOT / "docs/experiments.json", *ROOT.glob("benchmarks/results/*.json")]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_what_is_committed_has_a_row_a_line(path):
    text = path.read_text()
    assert as_json(json.loads(text)) == text
    assert max(map(len, text.splitlines())) <= 2000


def test_what_does_not_fit_on_a_line_is_opened():
    value = {"rows": [{"name": "é", "x": [1.5, None]}] * 200, "numbers": [*range(1000)], "all": {"true": True, "none": []}}
    text = as_json(value)
    assert json.loads(text) == value
    assert sum(line.startswith('  {"name"') for line in text.splitlines()) == 200
    assert max(map(len, text.splitlines())) < 2000 and len(text.splitlines()) < 220


def test_a_marked_part_is_replaced():
    page = "a\n<!-- table: begin, by x.py -->\nold\n<!-- table: end -->\nb\n"
    assert with_block(page, "table", "new \\1\n") == page.replace("old", "new \\1")
    assert with_block(with_block(page, "table", ""), "table", "old") == page
    with pytest.raises(ValueError, match="lacks the comments <!-- plots: begin --> and"):
        with_block(page, "plots", "new")
