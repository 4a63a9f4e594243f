"""Text files are UTF-8 whatever the locale: each call that opens one says so."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TEXT = ("read_text", "write_text", "open", "fdopen")


def silent(tree):
    """Lines that open a text file without naming its encoding."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            words = [x.value for x in [*node.args, *(k.value for k in node.keywords)] if isinstance(x, ast.Constant)]
            binary = any(isinstance(word, str) and word in ("rb", "wb", "ab", "r+b") for word in words)
            if name in TEXT and not binary and "encoding" not in [k.arg for k in node.keywords]:
                owner = getattr(getattr(node.func, "value", None), "id", "")
                if owner != "os" or name == "fdopen":
                    yield node.lineno


@pytest.mark.parametrize("folder", ["python/quietstar", "examples", "experiments"])
def test_text_files_are_utf_8(folder):
    files = [(file, ast.parse(file.read_text(encoding="utf-8"))) for file in sorted((ROOT / folder).rglob("*.py"))]
    assert [f"{file.relative_to(ROOT)}:{line}" for file, tree in files for line in silent(tree)] == []
