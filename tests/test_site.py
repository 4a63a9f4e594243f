"""The site of ``make docs`` in a browser: pictures, formulas, links and the search, from disk and from a server."""

import functools
import os
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).parents[1]
FOUND = """
() => {
  const text = document.querySelector("article").cloneNode(true);
  text.querySelectorAll("pre, code").forEach((x) => x.remove());
  return {
    ids: [...document.querySelectorAll("[id]")].map((x) => x.id),
    links: [...document.querySelectorAll("a[href]")].map((x) => x.href),
    missing: [...document.images].filter((x) => !x.complete || !x.naturalWidth).map((x) => x.src),
    raw: text.textContent.match(/\\$|\\\\[()[\\]]/g) ?? [],
    formulas: document.querySelectorAll("math").length,
    wide: document.documentElement.scrollWidth > innerWidth,
  };
}
"""
QUIET = {"NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, env=os.environ | QUIET, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def served(site):
    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.long
def test_every_page(site, browser):
    """On a phone, from disk: nothing missing, raw, dead or wider than the screen, no error, nothing from the network."""
    page = browser.new_page(viewport={"width": 360, "height": 740})
    wrong, found = [], {}
    page.on("console", lambda message: wrong.append((page.url, message.text)))
    page.on("pageerror", lambda error: wrong.append((page.url, str(error))))
    page.on("request", lambda request: request.url.startswith("http") and wrong.append((page.url, request.url)))
    for file in site.rglob("*.html"):
        page.goto(file.as_uri())
        page.wait_for_function("document.forms.search")
        found[file] = page.evaluate(FOUND)
        wrong += [(file, what, found[file][what]) for what in ("missing", "raw", "wide") if found[file][what]]
    for file, here in found.items():
        for link in here["links"]:
            path, anchor = urldefrag(link)
            target = Path(unquote(path.removeprefix("file://")))
            if path.startswith("file:") and (not target.is_file() or anchor and anchor not in found[target]["ids"]):
                wrong.append((file, link))
    assert wrong == []
    assert len(found) > 20 and sum(here["formulas"] for here in found.values()) > 20
    page.close()


@pytest.mark.long
@pytest.mark.parametrize("where", ["disk", "server"])
def test_search_finds_the_reference_of_an_op(site, served, browser, where):
    start = f"{site.as_uri() if where == 'disk' else served}/docs/online.html"
    for op in ("thought_attention", "linear_logprob"):
        page = browser.new_page()
        page.goto(start)
        page.get_by_role("textbox", name="Search").press_sequentially(op)  # as who types: keys are what it looks at
        first = page.locator(f".md-search-result__link[href*='h={op}']").first
        first.wait_for(state="attached")
        assert first.get_attribute("href").endswith(f"/reference/quietstar_kernels.html?h={op}#quietstar_kernels.{op}.{op}")
        page.close()
    assert "docs/log.html" not in (site / "search/search_index.json").read_text()
