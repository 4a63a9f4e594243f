"""Computes the numbers of docs/pretrained.md anew from docs/pretrained.json, with nothing but Python, sharing no code with the
report: every cell of its tables of answers, thoughts, rates and GSM8K, the gate, and what the claims say.

    python experiments/recompute_pretrained.py [FOLDER]        exit status 1 if the page says otherwise
"""

import json
import math
import re
import sys
from pathlib import Path

T975 = {1: 12.706205, 2: 4.302653, 3: 3.182446, 4: 2.776445, 5: 2.570582, 6: 2.446912, 7: 2.364624}  # of any table
RIVALS = {  # by the page's row: arm and measurement
    "the start, thinking, with a trained mixing head": ("head", "answers"),
    "the same without the reward, thinking": ("no-reward", "answers"),
    "thoughts sampled once, the best trained on, thinking": ("offline", "answers"),
    "one round of STaR, writing an aside": ("star", "answers"),
    "GRPO, writing an aside": ("grpo", "answers"),
    "RLP, writing an aside": ("rlp", "answers"),
    "supervised chains, writing": ("chains", "answers"),
    "plain training of all weights on four times the problems": ("plain", "answers"),
    "the start, writing": ("warm", "answers"),
    "the start, writing an aside": ("warm", "aside"),
    "the same, kept from the aside that doesn't help": ("warm", "forced"),
    "a vote of four of its asides": ("warm", "vote"),
    "Quiet-STaR's model, not thinking": ("quiet-star", "without"),
}
OURS = "**Quiet-STaR, thinking**"
BESIDE = "Quiet-STaR's model, a new thought before each token"
ROWS = {OURS: ("quiet-star", "answers"), **RIVALS, BESIDE: ("quiet-star", "always")}
WAYS = {
    "no thought": "none", "own thoughts": "own", "another problem's thought": "another", "one constant thought": "constant",
    "random tokens": "random",
}  # fmt: skip
PARTS = "test", "new"
NO_RIVALS = {"form": [], "steps": [x for x, y in RIVALS.items() if y[0] in ("chains", "rlp", "plain") or y[1] == "forced"]}
CLAIMED = {"form": ["100", "101", "102"], "steps": ["100", "101", "102", "103", "104"]}


def mean(values):
    return sum(values) / len(values)


def half(values):
    """Half of the 95 % interval of a mean, by Student's t: of a table, or from z as Cornish and Fisher."""
    df, middle, z = len(values) - 1, mean(values), 1.959964
    t = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    deviation = math.sqrt(sum((x - middle) ** 2 for x in values) / df)
    return T975.get(df, t) * deviation / math.sqrt(df + 1)


def shown(values, sign="", digits=2):
    values = [x for x in values if x is not None]
    if not values:
        return ""
    interval = f" ± {half(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.{digits}f}{interval}"


def final(text):
    """What stands behind an aside, if it is an answer."""
    if text.startswith(" (") and ")" in text:
        text = text[text.index(")") + 1 :]
    return text if re.fullmatch(r" \d+\.", text) else None


def right(found, problems):
    """The share of problems whose most frequent answer is right."""
    each = len(found["texts"]) // len(problems)
    good = 0
    for number, problem in enumerate(problems):
        answers = [final(text) for text in found["texts"][number * each : number * each + each]]
        answers = [answer for answer in answers if answer]
        best = max(answers, key=lambda answer: (answers.count(answer), -answers.index(answer))) if answers else None
        good += best == f" {problem['answer']}."
    return good / len(problems)


def asides(found):
    return found.get("thoughts") or [text[2:] if text.startswith(" (") else text for text in found["texts"]]


def chain_shares(found, problems):
    """How many asides are chains, and how many of these are right."""
    some = asides(found)
    each = len(some) // len(problems)
    chains = [i for i, text in enumerate(some) if re.match(r"\d+[+-]\d+=\d+, \d+[+-]\d+=\d+\)", text)]
    good = [i for i in chains if some[i].startswith(problems[i // each]["chain"] + ")")]
    return len(chains) / len(some), len(good) / len(chains) if chains else None


def of_setting(seeds, problems):
    """By title, the cells of each row of a setting's tables."""
    seeds = dict(sorted(seeds.items()))

    def shares(row, part):
        arm, kind = ROWS[row]
        return [right(x[arm][kind][part], problems[part]) if kind in x.get(arm, {}) else None for x in seeds.values()]

    def gaps(row, part):
        both = zip(shares(OURS, part), shares(row, part), strict=True)
        return [x - y for x, y in both if x is not None and y is not None]

    answers, over, chains, worth, sampled = {}, {}, {}, {}, {}
    for row, (arm, kind) in ROWS.items():
        cells = [shares(row, part) for part in PARTS]
        answers[row] = [x for some in cells for x in (*("" if y is None else f"{y:.2f}" for y in some), shown(some))]
        both = [gaps(row, part) for part in PARTS]
        over[row] = [x for some in both for x in (shown(some, "+"), f"{sum(y > 0 for y in some)} of {len(some)}")]
        having = [x[arm][kind] for x in seeds.values() if kind in x.get(arm, {})]
        counted = [[chain_shares(x[part], problems[part]) for x in having] for part in PARTS]
        chains[row] = [shown(column) for some in counted if some for column in zip(*some, strict=True)]
    having = [x["quiet-star"]["worth"] for x in seeds.values() if "worth" in x.get("quiet-star", {})]
    for words, way in WAYS.items():
        worth[words] = [shown([mean(x[part][way]) - mean(x[part]["own"]) for x in having], "+") for part in PARTS]
    for words, arm in {"the start": "warm", "Quiet-STaR": "quiet-star"}.items():
        columns = []
        for x in seeds.values():
            if "sampled" in x.get(arm, {}):
                some = x[arm]["sampled"]["test"]["thoughts"]
                each = len(some) // len(problems["test"])
                good = [text.startswith(problems["test"][i // each]["chain"] + ")") for i, text in enumerate(some)]
                groups = [good[i : i + each] for i in range(0, len(good), each)]
                columns.append((mean(good), mean([any(x) for x in groups]), mean([len(set(x)) == 2 for x in groups])))
        sampled[words] = [shown(column) for column in zip(*columns, strict=True)]
    tables = {
        "Right answers": answers, "Right answers of Quiet-STaR over each rival": over,
        "What is thought or written before the answer": chains, "Gain in the log-probability of the answer": worth,
        "Four thoughts for each problem with new numbers": sampled,
    }  # fmt: skip
    return tables, {row: gaps(row, "test") for row in RIVALS}


def verdict(gaps, rivals):
    """The claim's first words and its figure: against each rival, in the mean and in each seed."""
    bounds = {row: (mean(gaps[row]), half(gaps[row])) for row in rivals}
    best = min(rivals, key=lambda row: bounds[row][0])
    which = "is open"
    if any(x + y < 0 for x, y in bounds.values()):
        which = "is refuted"
    elif all(x - y > 0 for x, y in bounds.values()) and all(min(gaps[row]) > 0 for row in rivals):
        which = "holds"
    middle, wide = bounds[best]
    interval = f"({middle - wide:+.2f} to {middle + wide:+.2f})"
    return f"The claim {which}. Quiet-STaR's right answers: {middle:+.2f} {interval} over those of the best rival, {best};"


def of_gsm8k(arms):
    rows = {
        OURS: ("quiet-star", "own"), "the same, another question's thoughts": ("quiet-star", "another"),
        "the same, one constant thought": ("quiet-star", "constant"), "the same, not thinking": ("quiet-star", "none"),
        "plain training on four times the text": ("plain", "none"), "before training": ("base", "none"),
    }  # fmt: skip
    right = {row: [math.exp(x) for x in arms[arm]["right"][way]] for row, (arm, way) in rows.items()}
    gaps = {row: [x - y for x, y in zip(right[OURS], values, strict=True)] for row, values in right.items() if row != OURS}
    table, text, fitted = {}, arms["quiet-star"]["text"], {}
    for row, (arm, way) in rows.items():
        over = [x - y for x, y in zip(arms[arm]["right"][way], arms[arm]["other"][way], strict=True)]
        table[row] = [shown(right[row], digits=4), shown(gaps[row], "+", 4) if row in gaps else "", shown(over, "+", 4)]
    at, best = text["temperatures"].index(1.0), {}
    columns = {way: list(zip(*losses, strict=True)) for way, losses in text["nats"].items()}
    for way, losses in columns.items():
        best[way] = min(range(len(losses)), key=lambda i: mean(losses[i][::2]))
    for words, way in WAYS.items():
        gains = []
        for i, j in ((at, at), (best[way], best["own"])):
            gains.append([x - y for x, y in zip(columns[way][i][1::2], columns["own"][j][1::2], strict=True)])
        weight = f"{mean(text['weights'][way]):.2f}" if way in text["weights"] else ""
        cells = ["", ""] if way == "own" else [shown(gain, "+", 4) for gain in gains]
        fitted[words] = [f"{mean(columns[way][at][1::2]):.4f}", *cells, f"{text['temperatures'][best[way]]:g}", weight]
    holds = all(mean(gap) > half(gap) for gap in gaps.values())
    said = f"The claim {'holds' if holds else 'does not hold'}: right answers are more probable with own thoughts than"
    return {"mean over": table, "What thoughts are worth": fitted}, said


def tables_of(page):
    """(the line before it and its head, rows by name) of each table of a page."""
    found, before, lines = [], "", page.split("\n")
    for i, line in enumerate(lines):
        if line.startswith("| ---"):
            rows, at = {}, i + 1
            while at < len(lines) and lines[at].startswith("|"):
                name, *cells = (cell.strip() for cell in re.split(r"(?<!\\)\|", lines[at])[1:-1])
                rows[name] = cells
                at += 1
            found.append((f"{before} {lines[i - 1]}", rows))
        elif line and not line.startswith("|"):
            before = line
    return found


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs"
    data = json.loads((folder / "pretrained.json").read_text(encoding="utf-8"))
    page = (folder / "pretrained.md").read_text(encoding="utf-8").split("<!-- pretrained: begin")[1]
    titles = {"form": "Choosing between two asides that were practised", "steps": "Better steps", "gsm8k": "GSM8K"}
    sections = {title.strip(): text for title, _, text in (x.partition("\n") for x in page.split("### "))}
    compared, wrong = 0, []

    def compare(where, row, cells, expected):
        nonlocal compared
        compared += len(cells)
        if cells != expected:
            wrong.append(f"{where}: {row}: the page has {cells}, computed {expected}")

    for name, title in titles.items():
        seeds = data["results"].get(name, {}).values()
        if not any({"base", "plain"} <= set(arms) if name == "gsm8k" else "quiet-star" in arms for arms in seeds):
            continue  # not tried yet
        if name == "gsm8k":
            tables, said = of_gsm8k(data["results"][name]["0"])
        else:
            tables, gaps = of_setting(data["results"][name], data["problems"][name])
            rivals = [row for row in RIVALS if row not in NO_RIVALS[name]]
            whole = sorted(data["results"][name]) == CLAIMED[name] and all(len(gaps[x]) == len(CLAIMED[name]) for x in rivals)
            said = verdict(gaps, rivals) if whole else "The claim is not tested yet"
        if said not in sections[title]:
            wrong.append(f"{title}: not on the page: {said}")
        for about, rows in tables_of(sections[title]):
            starts = sorted((start for start in tables if start in about), key=len)
            computed = tables[starts[-1]] if starts else None
            for row, cells in rows.items() if computed else ():
                compare(f"{title}, {about.split(' |')[0]}", row, cells, computed[row])
    if "tuning" in data["results"]:
        for arm, rate, share in re.findall(r"\| (\S+) \| (\d[\d.e-]*) \| (\S+) \|", sections["Learning rates"]):
            found = data["results"]["tuning"]["99"][f"{arm} {rate}"]["answers"]["valid"]
            compare("rates", arm, [share], [f"{right(found, data['problems']['form']['valid']):.2f}"])
    if "sums" in data["results"]:
        thoughts = data["results"]["sums"]["99"]["warm"]["sampled"]["valid"]["thoughts"]
        some = data["problems"]["sums"]["valid"]
        good = sum(x.startswith(some[i * len(some) // len(thoughts)]["chain"] + ")") for i, x in enumerate(thoughts))
        if f"{good} of {len(thoughts)} sampled thoughts are right chains" not in page:
            wrong.append(f"the gate: computed {good} of {len(thoughts)}")
    print("\n".join([*wrong, f"{compared} cells compared, {len(wrong)} faults"]))
    return 1 if wrong or not compared else 0


if __name__ == "__main__":
    sys.exit(main())
