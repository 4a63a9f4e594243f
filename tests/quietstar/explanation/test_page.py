"""The page in a browser: what it shows, by mouse, finger and keyboard; and that model text stays text."""

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from quietstar.explanation.page import CLASSES, EDGES, SAME, colour, figures, visible
from quietstar.explanation.report import Alternative, ExplainedThought, ExplainedToken, Report

ROOT = Path(__file__).parents[3]
MODEL = {"class": "LlamaForCausalLM", "model_type": "llama", "name": "/home/me/runs/tiny", "parameters": 1_380_000}
MODEL["dtype"] = "float32"
SETTINGS = {"preset": "official", "mixing": "logits", "thoughts": 1, "thought_tokens": 2, "seed": None, "another": None}
WORDS = ["The", " sum", " of", " 12", " and", " 30", " is", " 42", ",", "\n", " which", " nobody", " doubts", "."]
MIXING = 0.25
GAINS = [None, -1.5, -0.5, -0.1, 0.0, 0.1, 0.5, 1.5]
ATTACKS = [
    "</script><script>attacked = 1</script>",
    '"><img src=x onerror="attacked = 1">',
    "<!--<script>",
    "{{data}} & 'quoted' `${1}` \\u003c",
    "\x00\x1b\x7f\r\t|",
    "\u202eabc\u2066",
    "\u2028\u2029\ufeff\ue000\ue001",
    "W" * 400,
    "é 中 🙂 ⟨C3⟩",
]


def report(texts, gains=GAINS, thoughts=1):
    """A report with these texts as tokens, these gains of content, and each other's as thoughts and likeliest tokens."""

    def alternatives(i, share):
        return [Alternative((i + k) % len(texts), texts[(i + k) % len(texts)], share / (k + 1)) for k in range(5)]

    def thought(i, n, mixed):
        ids = [(i + n) % len(texts), (i + 3) % len(texts)]
        own = [texts[x] for x in ids]
        return ExplainedThought(ids, own, "".join(own), 0.25 + n, mixed, alternatives(i + 1, 0.3))

    tokens = [ExplainedToken(0, texts[0], *[None] * 6, [], [])]
    for i in range(1, len(texts)):
        content = gains[1 + (i - 1) % (len(gains) - 1)]
        base, another, mixed = 3.0, 3.0 - MIXING, 3.0 - MIXING - content
        own = [thought(i, n, mixed) for n in range(thoughts)]
        parts = (base, mixed, another, base - mixed, MIXING, content)
        tokens.append(ExplainedToken(i, texts[i], *parts, own, alternatives(i, 0.2)))
    return Report(MODEL, {**SETTINGS, "thoughts": thoughts, "seed": 7 if thoughts > 1 else None}, tokens)


@pytest.fixture
def open_page(browser, tmp_path):
    """``open_page(report, **context options)``; at the end nothing may have gone to the console or the network."""
    contexts, seen = [], []

    def open_it(shown, width=1280, height=800, **options):
        file = tmp_path / f"{len(contexts)}.html"
        shown.save(file)
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda request: seen.append(request.url) if request.url != file.as_uri() else None)
        page.goto(file.as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert seen == []


def token(page, i):
    return page.locator("#text > span").nth(i)


def panel(page):
    return page.locator("#panel").inner_text()


def test_click_shows_what_the_report_has(open_page):
    shown = report(WORDS)
    page = open_page(shown)
    assert page.locator("#text > span").all_inner_texts()[7] == " 42"
    token(page, 7).click()
    cells = page.locator("#panel td").all_inner_texts()
    losses = shown.tokens[7].base, shown.tokens[7].another, shown.tokens[7].mixed
    percent = [f"{100 * math.exp(-x):#.2g} %".replace(". ", " ") for x in losses]
    weights = ("", "", "0.25")
    assert cells == [x for row in zip(percent, [f"{x:.2f}" for x in losses], weights, strict=True) for x in row]
    text = panel(page)
    assert "·42" in text and "token 8 of 14, id 7" in text and "What was thought helped: +1.50 nats" in text
    assert "content +1.50 and mixing +0.25 are a gain of +1.75" in text
    assert page.locator(".thought .token").all_inner_texts() == ["·42", "·which"]
    without, with_it = (page.locator(".tops ol").nth(i).inner_text().split() for i in (0, 1))
    assert without[:4] == ["·42", "◂", "20", "%"] and "◂" in with_it and with_it[:3] == [",", "30", "%"]
    token(page, 1).click()
    assert "Thinking hurt: −1.25 nats" in panel(page)
    token(page, 0).click()
    assert "nothing predicts it" in panel(page)


@pytest.mark.long
def test_keyboard(open_page):
    page = open_page(report(WORDS * 30))
    place = "Array.from(document.getElementById('text').children).indexOf(document.activeElement)"
    box = "(({left, right, top}) => [(left + right) / 2, top])(document.activeElement.getBoundingClientRect())"
    keys = page.keyboard
    keys.press("Tab")  # the switch of the colours
    keys.press("Tab")
    assert page.evaluate(place) == 0 and "nothing predicts it" in panel(page)
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    keys.press("ArrowRight")
    assert page.evaluate(place) == 1 and "token 2 of" in panel(page)
    label = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label == "sum, Thinking hurt, content −1.50 and mixing +0.25 nats, probability 5.0 % to 1.4 %"
    keys.press("ArrowLeft")
    keys.press("ArrowLeft")
    assert page.evaluate(place) == 0
    for _ in range(5):
        keys.press("ArrowRight")
    middle, top = page.evaluate(box)
    keys.press("ArrowDown")
    below, lower = page.evaluate(box)
    assert lower > top + 10 and abs(below - middle) < 80
    keys.press("ArrowUp")
    again, upper = page.evaluate(box)
    assert upper == top and abs(again - below) < 80
    keys.press("End")
    assert page.evaluate(place) == len(WORDS) * 30 - 1
    inside = page.evaluate("document.activeElement.getBoundingClientRect().bottom < innerHeight")
    assert inside and page.evaluate("scrollY") > 0
    keys.press("Home")
    keys.press("ArrowRight")
    keys.press("Enter")
    assert page.evaluate("document.activeElement.id") == "panel" and page.locator("#close").is_visible()
    keys.press("Escape")
    assert page.evaluate(place) == 1 and "Point at a token" in panel(page)
    keys.press("Tab")  # one stop in the text, however many tokens
    keys.press("Shift+Tab")
    assert page.evaluate(place) == 1


@pytest.mark.long
def test_phone(open_page, tmp_path):
    phone = {"width": 360, "height": 740, "has_touch": True, "is_mobile": True}
    page = open_page(report((WORDS + ATTACKS) * 4), **phone)
    fits = "document.documentElement.scrollWidth <= 360"
    assert page.evaluate(fits)
    for i in (30, 50, 1):
        token(page, i).tap()
        assert f"token {i + 1} of" in panel(page) and page.evaluate(fits)
        sheet = page.locator("#panel").bounding_box()
        chosen = page.evaluate("document.querySelector('[aria-selected=true]').getClientRects()[0].bottom")
        assert 0 < chosen <= sheet["y"] and sheet["y"] + sheet["height"] <= 740 and sheet["width"] == 360
    button = page.locator("#close").bounding_box()
    assert min(button["width"], button["height"]) >= 44
    assert len(page.screenshot(path=tmp_path / "phone.png")) > 10_000
    page.locator("#close").tap()
    assert "tap it" in panel(page)


CONTRAST = """
() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (x) => ((x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const page = channels(getComputedStyle(document.documentElement).backgroundColor);
  const ratio = (a, b) => ((x, y) => (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05))(light(a), light(b));
  const result = { page: light(page) };
  for (const element of document.querySelectorAll("#text > span, .cells span, .note, .model, .hint, i")) {
    const style = getComputedStyle(element), solid = element.closest("[class]");
    const behind = channels(getComputedStyle(solid).backgroundColor);
    const back = behind.length === 4 && behind[3] === 0 ? page : behind;
    const ink = channels(style.color).slice(0, 3).map((x, i) => x * style.opacity + back[i] * (1 - style.opacity));
    const name = element.className || "sign on " + solid.className;
    result[name] = Math.min(result[name] ?? 99, ratio(ink, back));
    if (/^[hp]/.test(element.className)) result["line of " + name] = ratio(channels(style.borderBottomColor), page);
  }
  return result;
}
"""


@pytest.mark.long
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_contrast(open_page, dark):
    page = open_page(report([*WORDS, *["\n"] * 7]), color_scheme="dark" if dark else "light")
    ratios = page.evaluate(CONTRAST)
    assert (ratios.pop("page") < 0.05) is dark
    assert set(CLASSES) <= set(ratios)
    assert {name: ratio for name, ratio in ratios.items() if ratio < (3 if "line" in name else 4.5)} == {}


@pytest.mark.long
def test_legend_and_summary(open_page):
    shown = report(WORDS)
    page = open_page(shown)
    assert page.locator(".edges span").all_inner_texts() == [f"{edge:+g}".replace("-", "−") for edge in EDGES]
    head = page.locator("header").inner_text()
    summary = shown.summary
    for part in ("runs/tiny", "1.38 million weights", "one thought of 2 tokens", f"{100 * summary['helped']:.0f} %"):
        assert part in head
    assert "What its thoughts are worth" in head and summary["content"] < summary["gain"]
    for name in ("gain", "mixing", "content", "content_low"):
        assert f"{summary[name]:+.3f}".replace("-", "−") in head
    assert "/home/me" not in shown.html


@pytest.mark.parametrize("gain, name", [(-1.0, "h2"), (-1.01, "h3"), (-0.051, "h1"), (0.0, "z"), (0.05, "p1"), (1.0, "p3")])
def test_colours(gain, name):
    assert colour(gain) == name


def test_a_token_is_helped_where_both_gains_are_above_0_and_hurt_where_the_gain_is_below():
    generator = random.Random(0)
    tokens = [ExplainedToken(0, "a", *[None] * 6, [], [])]
    for i in range(1, 500):
        base, mixed, another = (generator.choice([1.0, 1.04, generator.uniform(0, 3)]) for _ in range(3))
        tokens.append(ExplainedToken(i, "a", base, mixed, another, base - mixed, base - another, another - mixed, [], []))
    helped = [min(x.gain, x.content) >= SAME for x in tokens[1:]]
    hurt = [x.gain < -SAME for x in tokens[1:]]
    shown = Report(MODEL, SETTINGS, tokens)
    assert (shown.summary["helped"], shown.summary["hurt"]) == (sum(helped) / 499, sum(hurt) / 499)
    classes = re.findall(r'<span class="(\w+)">a</span>', shown.html)[1:]
    assert [x[0] for x in classes] == ["p" if x else "h" if y else "z" for x, y in zip(helped, hurt, strict=True)]


@pytest.mark.long
def test_the_colours_show_either_part(open_page):
    shown = report(WORDS)
    page = open_page(shown)
    for label, name in (("the whole gain", "gain"), ("what helped or hurt", "effect")):
        page.get_by_label(label).check()
        want = [colour(getattr(x, name)) for x in shown.tokens]
        assert page.locator("#text > span").evaluate_all("(all) => all.map((x) => x.className)") == want
        assert page.locator(".cells span").all_inner_texts() == [str(want.count(x)) for x in CLASSES]
    token(page, 7).click()
    page.get_by_label("the whole gain").check()
    assert page.locator("[aria-selected=true]").count() == 1 and "·42" in panel(page)


def test_model_text_is_data(open_page):
    page = open_page(report([*ATTACKS, *WORDS]), java_script_enabled=True)
    for i in range(len(ATTACKS)):
        token(page, i).click()
        panel(page)
    assert page.evaluate("typeof attacked") == "undefined" and page.locator("img").count() == 0
    shown = page.locator("#text > span").all_inner_texts()
    assert shown[0] == ATTACKS[0] and shown[1] == ATTACKS[1] and shown[3] == ATTACKS[3]
    assert shown[4] == "⟨U+0000⟩⟨U+001B⟩⟨U+007F⟩␍⇥\t|"
    assert shown[5] == "⟨U+202E⟩abc⟨U+2066⟩"
    assert shown[6] == "⟨U+2028⟩⟨U+2029⟩⟨U+FEFF⟩⟨U+E000⟩⟨U+E001⟩"
    assert shown[8] == ATTACKS[8]
    assert page.locator("script").count() == 2


# Pieces that hostile texts are made of, in any order, each perhaps cut off.
PIECES = [
    *ATTACKS,
    "</script",
    "<script>attacked = 1//",
    "<svg/onload=attacked=1>",
    "<iframe srcdoc='<script>parent.attacked=1</script>'>",
    "<a href=javascript:attacked=1>x</a>",
    "<style>@import 'https://example.org/x.css'</style>",
    "<meta http-equiv=refresh content='0;url=https://example.org'>",
    "<base href=https://example.org>",
    "]]>",
    "-->",
    '","gain":1e999,"x":"',
    "${attacked = 1}",
    "\\u003cscript\\u003e",
    "\\",
    "\ud800",
    "\U000e0041",
    "\x85",
]


@pytest.mark.long
def test_hostile_pages(open_page, browser, tmp_path):
    """No script of the text's runs, nothing is requested, and each token is shown, wherever the pieces meet."""
    draw = random.Random(0)

    def hostile():
        pieces = draw.choices(PIECES, k=draw.randint(1, 4))
        return "".join(piece[: draw.randint(1, len(piece))] if draw.random() < 0.3 else piece for piece in pieces)

    page = open_page(report(WORDS), java_script_enabled=True)
    for number in range(40):
        texts = [hostile() for _ in range(draw.randint(3, 12))]
        shown = replace(report(texts, thoughts=draw.randint(1, 2)), model={**MODEL, "name": hostile()})
        shown.settings["preset"] = hostile()
        data = re.search(r'id="data">(.*?)</script>', shown.html, re.DOTALL)[1]
        assert data.isascii() and not set("<>&") & set(data), (number, texts)
        shown.save(tmp_path / "0.html")
        page.reload()
        token(page, 1).click()
        panel(page)
        assert page.evaluate("typeof attacked") == "undefined", (number, texts)
        assert page.locator("script").count() == 2, (number, texts)
        assert page.locator("img, iframe, svg, base, #text a").count() == 0, (number, texts)
        assert page.locator("#text > span").count() == len(texts), (number, texts)


def test_the_policy_blocks_what_is_not_the_pages_own(browser, tmp_path):
    report(WORDS).save(tmp_path / "page.html")
    page = browser.new_page()
    blocked = []
    page.on("console", lambda message: blocked.append(message.text))
    page.goto((tmp_path / "page.html").as_uri())
    page.evaluate(
        """() => {
          document.body.append(Object.assign(document.createElement("script"), { textContent: "attacked = 1" }));
          document.body.append(Object.assign(document.createElement("img"), { src: "https://example.org/x.png" }));
        }"""
    )
    page.wait_for_timeout(100)
    assert page.evaluate("typeof attacked") == "undefined"
    assert len(blocked) == 2 and all("Content Security Policy" in text for text in blocked)
    page.close()


def test_the_file_holds_ascii_data_alone():
    """The policy and the browser have the rest."""
    page = report([*ATTACKS, *WORDS]).html
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert data.isascii() and not set("<>&") & set(data) and json.loads(data)["texts"]["7"] == ATTACKS[7]
    assert not set(page) & set("\x00\x1b\x7f\r\u202e\u2066\u2028\u2029\ufeff\ue000\ue001")


@pytest.mark.parametrize(
    "text, shown",
    [
        (" a b", " a b"),
        (" ", "[·]"),
        ("a  b", "a[··]b"),
        ("\n\n", "[↵]\n[↵]\n"),
        ("\t", "[⇥]\t"),
        ("\xa0\u200b\u00ad", "[⟨U+00A0⟩][⟨U+200B⟩][⟨U+00AD⟩]"),
        ("👩\u200d🔬", "👩\u200d🔬"),
        ("\ud800", "[⟨U+D800⟩]"),
    ],
)
def test_invisible_characters(text, shown):
    assert visible(text).replace("\ue000", "[").replace("\ue001", "]") == shown


@pytest.mark.parametrize("low, high, title", [(0.1, 0.3, "Where what was thought helped"), (-0.1, 0.3, "What thinking did")])
def test_the_title_is_what_the_interval_allows(low, high, title):
    means = {"gain": 0.2, "mixing": 0.1, "content": 0.1}
    ends = {f"{name}_{end}": x for name in means for end, x in (("low", low), ("high", high))}
    others = dict.fromkeys(("base", "another", "mixed", "helped", "hurt"), 0.5) | {"tokens": 9}
    assert figures(means | ends | others)["title"] == title
