"""A report as one HTML page: assets/explain.html with its style, its script and the report's data put in.

Model text is data. In the markup it is escaped, in the data every character but ASCII is, and so is "<"; the script makes text
nodes of it. The page's policy allows this script and this style, by their hashes, and no request to anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import unicodedata
from bisect import bisect_right
from importlib.resources import files
from pathlib import Path
from typing import Any

from quietstar.evaluation.intervals import PARTS, smaller
from quietstar.explanation.tokens import SAME, ExplainedToken

# Where the colours change. Class h3 is a loss of over 1 nat, z about the same, p3 a gain of 1 or more.
EDGES = (-1.0, -0.3, -SAME, SAME, 0.3, 1.0)
CLASSES = ("h3", "h2", "h1", "z", "p1", "p2", "p3")
FIRST = "first"  # the class of the first token, which nothing predicts
# Around signs for something invisible. From the private use area, whose own characters are shown by number.
MARK, UNMARK = "\ue000", "\ue001"
SIGNS = {"\n": f"{MARK}↵{UNMARK}\n", "\r": f"{MARK}␍{UNMARK}", "\t": f"{MARK}⇥{UNMARK}\t"}
JOINERS = "\u200c\u200d"  # part of Persian words and of emoji


def render(model: dict[str, Any], settings: dict[str, Any], summary: dict[str, Any], tokens: list[ExplainedToken]) -> str:
    """The page of a ``Report`` with these attributes."""
    folder = files("quietstar.explanation") / "assets"
    template, style, script = ((folder / f"explain.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    # A folder's name may hold bytes that are no text, which Python keeps as halves of surrogate pairs.
    described = describe(model, settings, tokens).encode(errors="backslashreplace").decode()
    parts = {
        "style": style,
        "script": script,
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "model": html.escape(described),
        **figures(summary),
        "legend": _legend(tokens),
        "text": "".join(_span(token) for token in tokens),
        "data": _as_script_data(_data(tokens)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def describe(model: dict[str, Any], settings: dict[str, Any], tokens: list[ExplainedToken]) -> str:
    """The model and the settings in a line."""
    T = settings["thought_tokens"]
    named = f" ({'/'.join(Path(model['name']).parts[-2:])})" if model["name"] else ""
    one = settings["thoughts"] == 1
    thoughts = "one thought" if one else f"{settings['thoughts']} thoughts"
    stopped = any(len(thought.ids) < T for token in tokens for thought in token.thoughts)
    how = "the likeliest tokens" if settings["seed"] is None else f"sampled with seed {settings['seed']}"
    of = "this text's, from half of it further on" if settings["another"] is None else "another text's, at the same places"
    leaks = [thought.leaks for token in tokens for thought in token.thoughts]
    leaked = f" {sum(leaks):,} of {len(leaks):,} thoughts hold the next four tokens of the text." if any(leaks) else ""
    return (
        f"{model['class']}{named}, {_count(model['parameters'])} weights, {model['dtype']}. Before every token {thoughts} of "
        f"{'up to ' if stopped else ''}{T} tokens{'' if one else ' each'}, {how}. The other thoughts are {of}. Preset "
        f"{settings['preset']}, mixing {settings['mixing']}.{leaked}"
    )


def figures(summary: dict[str, Any]) -> dict[str, str]:
    shown = {"worth": smaller(summary), **{part: part for part in PARTS}}
    low, high = (summary[f"{shown['worth']}_{end}"] for end in ("low", "high"))
    return {
        "title": "Where what was thought helped" if low > 0 else "Where thinking hurt" if high < 0 else "What thinking did",
        **{f"{name}{end}": signed(summary[f"{part}{end}"]) for name, part in shown.items() for end in ("", "_low", "_high")},
        **{name: f"{summary[name]:.3f}" for name in ("base", "another", "mixed")},
        "tokens": f"{summary['tokens']:,}",
        "helped": f"{100 * summary['helped']:.0f} %",
        "hurt": f"{100 * summary['hurt']:.0f} %",
    }


def signed(nats: float) -> str:
    return f"{nats:+.3f}".replace("-", "−")


def visible(text: str, spaces: str = "  +|^ $") -> str:
    """Text with signs for what the eye can't see: line ends, control and bidirectional characters, the spaces that match."""
    text = "".join(map(_visible_letter, text))
    return re.sub(spaces, lambda match: f"{MARK}{'·' * len(match[0])}{UNMARK}", text)


def _visible_letter(letter: str) -> str:
    if letter in SIGNS:
        return SIGNS[letter]
    if letter in JOINERS or letter == " ":
        return letter
    invisible = unicodedata.category(letter) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp", "Zs")
    return f"{MARK}⟨U+{ord(letter):04X}⟩{UNMARK}" if invisible else letter


def colour(nats: float | None) -> str:
    return FIRST if nats is None else CLASSES[bisect_right(EDGES, nats)]


def _span(token: ExplainedToken) -> str:
    shown = html.escape(visible(token.text)).replace(MARK, "<i>").replace(UNMARK, "</i>")
    return f'<span class="{colour(token.effect)}">{shown}</span>'


def _legend(tokens: list[ExplainedToken]) -> str:
    """A cell for each colour with how many tokens have it, then the edges between the cells."""
    counts = dict.fromkeys(CLASSES, 0)
    for token in tokens[1:]:
        counts[colour(token.effect)] += 1
    cells = "".join(f'<span class="{name}">{count}</span>' for name, count in counts.items())
    edges = "".join(f"<span>{edge:+g}</span>".replace("-", "−") for edge in EDGES)
    return f'<div class="cells">{cells}</div><div class="edges">{edges}</div>'


def _data(tokens: list[ExplainedToken]) -> dict[str, Any]:
    """What the script shows, short: each token's text once, then rows of numbers and the colours to choose from."""
    strings: dict[int, str] = {}

    def top(alternatives: list) -> list:
        strings.update((x.id, x.text) for x in alternatives)
        return [[x.id for x in alternatives], [_short(x.probability) for x in alternatives]]

    rows = []
    for token in tokens:
        for thought in token.thoughts:
            strings.update(zip(thought.ids, thought.tokens, strict=True))
        thoughts = [[_short(x.weight), _short(x.mixed), x.ids, top(x.top)] for x in token.thoughts]
        surprise = [_short(x) for x in (token.base, token.another, token.mixed) if x is not None]
        rows.append([token.id, surprise, thoughts, top(token.top)])
    texts = {token: visible(text, spaces=" +") for token, text in sorted(strings.items())}
    colours = {part: [colour(getattr(token, part)) for token in tokens] for part in ("effect", "gain")}
    return {"rows": rows, "texts": texts, "colours": colours}


def _short(number: float) -> float:
    return float(f"{number:.4g}")


def _count(number: int) -> str:
    for size, name in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:,}"


def _as_script_data(value: Any) -> str:
    """JSON in ASCII, in which no "<", ">" or "&" is left that could end the script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
