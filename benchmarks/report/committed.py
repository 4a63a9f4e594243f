"""What is committed of results: JSON with a row a line, and the parts of pages that are written from it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

WIDTH = 1900  # of a line, in characters


def as_json(value: Any) -> str:
    """JSON in which what fits on a line is one. Of what doesn't, each object and each key has a line of its own."""
    return _opened(value, "") + "\n"


def _opened(value: Any, indent: str) -> str:
    text = json.dumps(value)
    if not isinstance(value, dict | list | tuple) or len(text) <= WIDTH:
        return text
    inner = indent + " "
    if isinstance(value, dict):
        members = [f"{json.dumps(key)}: {_opened(member, inner)}" for key, member in value.items()]
    else:
        members = _packed(value, inner)
    return "\n".join([text[0], ",\n".join(inner + member for member in members), indent + text[-1]])


def _packed(values: list[Any] | tuple[Any, ...], indent: str) -> list[str]:
    """A line for each object. Numbers and lists share lines."""
    lines: list[str] = []
    for value in values:
        text = _opened(value, indent)
        if lines and not isinstance(value, dict) and len(lines[-1]) + len(text) < WIDTH:
            lines[-1] += f", {text}"
        else:
            lines.append(text)
    return lines


def write_block(page: Path, name: str, content: str) -> None:
    """Replace what a Markdown page has between the comments ``name: begin`` and ``name: end``. A new page has nothing else."""
    marks = f"<!-- {name}: begin -->\n<!-- {name}: end -->\n"
    text = page.read_text(encoding="utf-8") if page.exists() else marks
    page.write_text(with_block(text, name, content), encoding="utf-8")


def with_block(text: str, name: str, content: str) -> str:
    """Raises ValueError if the page lacks the comments."""
    marks = rf"(<!-- {name}: begin\b[^>]*-->\n).*?(<!-- {name}: end -->)"
    changed, found = re.subn(marks, lambda match: f"{match[1]}{content.rstrip()}\n{match[2]}", text, count=1, flags=re.DOTALL)
    if not found:
        raise ValueError(f"the page lacks the comments <!-- {name}: begin --> and <!-- {name}: end -->")
    return changed
