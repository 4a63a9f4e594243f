"""What ``make docs`` adds to the pages of this folder: the README and other files that they link to, and pages that are
written anew each time: the reference, the commands' help, and what was measured.
"""

from __future__ import annotations

import contextlib
import fnmatch
import html
import importlib
import importlib.util
import inspect
import io
import os
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from benchmarks.report import pages as benchmark_pages  # noqa: E402, from this repository
from benchmarks.report import results_file  # noqa: E402

PACKAGES = ("quietstar", "quietstar_kernels", "quietstar_recipes")
# Pages by what they are for. One that isn't named here comes last.
SECTIONS = {
    "Start": ["README.md", "docs/tutorial.md", "docs/how-it-works.md"],
    "Guides": [
        *(f"docs/{name}.md" for name in ("branches", "group-rl", "hybrid-models", "training", "online", "offline-thoughts")),
        *(
            f"docs/{name}.md"
            for name in ("large-models", "using", "serving", "recipes", "integrating", "parallel", "building", "reliability")
        ),
        "examples/cluster/README.md",
    ],
    "Results": [
        *(f"docs/{name}.md" for name in ("performance", "results", "pretrained", "recipe-results", "executed")),
        "benchmarks/results/*.md",
    ],
    "Reference": ["docs/commands.md", "reference/*.md"],
    "Development": ["DESIGN.md", "CONTRIBUTING.md", "docs/log.md", "CHANGELOG.md", "tests/golden/README.md"],
    "More": ["*.md"],
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s:]+)(?:#[^)\s]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.theme.static_templates -= {"404.html"}  # which has no style unless the site is at the root of a server
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    written = dict(pages())
    ours = [file for file in files if file.src_dir == config.docs_dir]
    docs = [f"docs/{file.src_uri}" for file in ours if not file.src_uri.endswith((".py", ".pyc", ".json"))]
    paths = {"README.md", "CHANGELOG.md", *docs}
    todo = sorted(paths | written.keys())
    while todo:  # what pages link to belongs to the site
        path = todo.pop()
        found = {linked for linked in linked_files(path, written.get(path)) if linked not in paths | written.keys()}
        paths |= found
        todo += sorted(found)
    site = [File.generated(config, path, content=text) for path, text in written.items()]
    site += [File(path, str(ROOT), config.site_dir, use_directory_urls=False) for path in sorted(paths)]
    config.nav = navigation([file.src_uri for file in site if file.is_documentation_page()])
    return Files([*(file for file in files if file not in ours), *site])


def linked_files(path: str, text: str | None) -> Iterator[str]:
    if not path.endswith(".md"):
        return
    text = (ROOT / path).read_text() if text is None else text
    for target in [target for _, target in LINK.findall(text)] + re.findall(r'<img src="([^":]+)"', text):
        linked = os.path.normpath(os.path.join(os.path.dirname(path), target))
        if (ROOT / linked).is_file():
            yield linked


def navigation(paths: list[str]) -> list[dict[str, list[str]]]:
    left, nav = sorted(paths), []
    for section, patterns in SECTIONS.items():
        chosen = [path for pattern in patterns for path in fnmatch.filter(left, pattern)]
        left = [path for path in left if path not in chosen]
        nav += [{section: list(dict.fromkeys(chosen))}] if chosen else []
    return nav


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """A site has no folders to show, so links to them become their text. The page of the commands gets their help. A search for
    an op finds its reference before what it was measured against, and nothing of the log.
    """
    folder = (ROOT / page.file.src_uri).parent
    if page.file.src_uri.startswith("benchmarks/"):
        page.meta["search"] = {"boost": 0.1}
    if page.file.src_uri == "docs/log.md":
        page.meta["search"] = {"exclude": True}
    if page.file.src_uri == "docs/commands.md":
        markdown += f"\n{commands()}\n"
    return LINK.sub(lambda match: match[1] if (folder / match[2]).is_dir() else match[0], markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers show without a script."""

    def mathml(match: re.Match[str]) -> str:
        tag, kind, formula = match.groups()
        math = convert(html.unescape(formula), display="inline" if kind == "(" else "block")
        return f'<{tag} class="formula">{math}</{tag}>'

    return FORMULA.sub(mathml, content)


def pages() -> Iterator[tuple[str, str]]:
    """(path, text) of the pages that no file holds."""
    for name in PACKAGES:
        if importlib.util.find_spec(name):
            yield f"reference/{name}.md", reference(name)
    for path in benchmark_pages.all_results():
        plots = sorted(path.parent.glob(f"{path.stem}-*.png"))
        yield f"benchmarks/results/{path.stem}.md", benchmark_pages.page(results_file.load(path), plots)


def reference(package: str) -> str:
    module = importlib.import_module(package)
    blocks = inspect.cleandoc(module.__doc__ or "").split("\n\n")
    text = "\n\n".join(key_table(block) if block.startswith("=") else block for block in blocks)
    names = "\n\n".join(f"::: {home(module, name)}" for name in public(module))
    return f"# {package}\n\n{text}\n\n{names}\n"


def key_table(block: str) -> str:
    """The dimension key as a Markdown table, one letter a row."""
    cells = [re.split(r"\s{2,}", line, maxsplit=3) for line in block.splitlines() if not line.startswith("=")]
    rows = [row[:2] for row in cells] + [row[2:] for row in cells if len(row) == 4]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {letter} | {meaning} |" for letter, meaning in rows)]).replace("*", r"\*")


def public(module: Any) -> list[str]:
    """The names of a package; of one that doesn't list them, its modules."""
    return getattr(module, "__all__", None) or [found.name for found in pkgutil.iter_modules(module.__path__)]


def home(module: Any, name: str) -> str:
    """Where a name is defined, since a function may be called as its module is."""
    thing = getattr(module, name, None)
    return f"{getattr(thing, '__module__', module.__name__)}.{name}"


def commands() -> str:
    from quietstar.cli import main

    completion = f"## Completion\n\n```text\n{main.COMPLETION.strip()}\n```"
    return "\n\n".join([completion, *(f"## quietstar {name}\n\n{help_of(name)}" for name in main.COMMANDS)])


def help_of(command: str) -> str:
    from quietstar.cli.main import main

    plain = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    shown = io.StringIO()
    with mock.patch.dict(os.environ, plain), contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main([command, "--help"])
    return f"```text\n{shown.getvalue().strip()}\n```"
