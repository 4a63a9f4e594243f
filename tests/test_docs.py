"""The documentation is true: its code runs, its links lead somewhere, its tables are those of the code."""

import dataclasses
import importlib
import importlib.util
import io
import re
import sys
from pathlib import Path

import pytest

import quietstar
from quietstar import ThoughtConfig
from quietstar_kernels import backends
from tests.test_layers import missing

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(ROOT / name for name in ("tests/golden/README.md", "examples/cluster/README.md", "csrc/README.md", "csrc/cpu/README.md")),
    ROOT / "benchmarks/results/README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob(".github/*.md")),
]
WITH_CODE = [page for page in PAGES if "```python\n" in page.read_text()]
EXAMPLE = ("such as ", "about ")  # starts a comment on a print that prints something else each time


def page_id(path):
    return str(path.relative_to(ROOT))


def blocks(path, language):
    """(line, code) of each fenced block."""
    text = path.read_text()
    return [
        (text[: match.start()].count("\n") + 2, match[1])
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


def prose(path):
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def table(path, heading):
    """Cells of the table whose first column has that heading, without the two head lines."""
    lines = path.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[:1] + rows[2:]


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page)) + re.findall(r'src="([^"]+)"', prose(page))
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page_id(page)}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(file), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page_id(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_named_in_the_text_exist(page):
    for name in re.findall(r"`([\w.-]+(?:/[\w.-]+)+/?)`", prose(page)):
        if not name.startswith(("ezelikman/", "runs/", "config.out/")):  # published code, and folders of users
            assert (ROOT / name).exists(), f"{page_id(page)}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_names_in_the_text_exist(page):
    """Every `quietstar.x`, `quietstar_kernels.x` or `ThoughtLayout.x` is there."""
    for name in re.findall(r"`((?:quietstar|quietstar_kernels|ThoughtLayout)(?:\.\w+)+)", prose(page)):
        if name.endswith((".json", ".safetensors")):
            continue
        module, *rest = name.split(".")
        if module == "quietstar" and rest[0] in quietstar.__all__:  # which test_layers.py imports
            continue
        thing = importlib.import_module("quietstar_kernels" if module == "ThoughtLayout" else module)
        for part in [module] * (module == "ThoughtLayout") + rest:
            if not hasattr(thing, part):
                importlib.import_module(f"{thing.__name__}.{part}")
            thing = getattr(thing, part)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"^make ([\w-]+)", page.read_text(), re.MULTILINE) + re.findall(r"`make ([\w-]+)", page.read_text())
    assert set(named) <= targets


class Prints:
    """Stands in for ``print`` in the code of a page, and keeps what each line printed."""

    def __init__(self):
        self.printed = {}

    def __call__(self, *values, **options):
        text = io.StringIO()
        print(*values, **options, file=text)
        line = sys._getframe(1).f_lineno
        self.printed[line] = self.printed.get(line, "") + text.getvalue()

    def differences(self, page):
        """A comment after a print is what it prints, unless it starts with a word of EXAMPLE."""
        for line, text in enumerate(page.read_text().splitlines(), 1):
            comment = re.search(r"^ *print\(.*\)  # (.+)", text)
            if comment and not comment[1].startswith(EXAMPLE) and self.printed.get(line, "").rstrip("\n") != comment[1]:
                yield f"{page_id(page)}, line {line}, prints {self.printed.get(line, '')!r}"


@pytest.mark.parametrize("page", WITH_CODE, ids=page_id)
def test_what_code_uses_is_there(page):
    assert not [x for line, code in blocks(page, "python") for x in missing(code, f"{page_id(page)}, block at {line}")]


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.long] * (page.parent != ROOT), id=page_id(page)) for page in WITH_CODE]
)
def test_code_runs_and_prints_what_it_says(page, tmp_path, monkeypatch):
    """All blocks of a page in order, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    prints = Prints()
    namespace = {"print": prints}
    for line, code in blocks(page, "python"):
        padded = "\n" * (line - 1) + code
        exec(compile(padded, str(page), "exec"), namespace)
    assert not list(prints.differences(page))


def test_back_ends_of_the_readme():
    """An operation that the README says a back end has is there, and none that it says is not yet."""
    (_, _, *names), *rows = table(ROOT / "README.md", "operation")
    stated = {
        (operation, name.strip("`")): {"yes": True, "no": False}[cell]
        for operations, _, *cells in rows
        for operation in re.findall(r"\w+", operations)
        for name, cell in zip(names, cells, strict=True)
    }
    known = {
        (op, name): name == "reference" or importlib.util.find_spec(f"quietstar_kernels.{name}.{op}") is not None
        for op, name in stated
    }
    assert stated.keys() == {(row["op"], row["backend"]) for row in backends("cpu")}
    assert stated == known


def test_preset_table():
    """Every field of ThoughtConfig, in order, with its value in both presets."""
    rows = table(ROOT / "docs/integrating.md", "field")[1:]
    presets = [ThoughtConfig(preset=name) for name in ("official", "paper")]
    names = [field.name for field in dataclasses.fields(ThoughtConfig) if field.name != "preset"]
    expected = [[f"`{name}`", *(f"`{getattr(preset, name)!r}`" for preset in presets)] for name in names]
    assert [row[:3] for row in rows] == expected
    assert all(row[3] for row in rows)


def test_errors_named_are_those_of_the_code():
    sources = "".join(
        path.read_text() for folder in ("python/quietstar", "quietstar_kernels") for path in (ROOT / folder).rglob("*.py")
    )
    for cell, *_ in table(ROOT / "docs/integrating.md", "the message has")[1:]:
        part = cell.split("`")[1]
        assert part in sources, part
