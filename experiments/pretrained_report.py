"""The tables of docs/pretrained.md from the results of pretrained.py, which are also kept in docs/pretrained.json."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from digit_sums_report import rounded
from experiments_report import markdown
from pretrained_evaluation import without_aside
from pretrained_problems import Problem
from pretrained_training import SETTINGS

from benchmarks.report.committed import as_json, write_block
from quietstar.evaluation.intervals import mean_interval
from quietstar.files.pictures import can_draw, new_figure, save
from quietstar.files.reading import read_json
from quietstar.files.writing import write_whole

PARTS = {"test": "new numbers", "new": "new stories"}
TITLES = {"form": "Choosing between two asides that were practised", "steps": "Better steps"}
OURS = "quiet-star", "answers"
GATE = 0.05  # of sampled thoughts
# What answers, by arm and measurement; all but OURS, BESIDE and GOLD are rivals of the claim.
ROWS = {
    OURS: "**Quiet-STaR, thinking**",
    ("head", "answers"): "the start, thinking, with a trained mixing head",
    ("no-reward", "answers"): "the same without the reward, thinking",
    ("offline", "answers"): "thoughts sampled once, the best trained on, thinking",
    ("star", "answers"): "one round of STaR, writing an aside",
    ("grpo", "answers"): "GRPO, writing an aside",
    ("rlp", "answers"): "RLP, writing an aside",
    ("chains", "answers"): "supervised chains, writing",
    ("plain", "answers"): "plain training of all weights on four times the problems",
    ("warm", "answers"): "the start, writing",
    ("warm", "aside"): "the start, writing an aside",
    ("warm", "forced"): "the same, kept from the aside that doesn't help",
    ("warm", "vote"): "a vote of four of its asides",
    ("quiet-star", "without"): "Quiet-STaR's model, not thinking",
    ("quiet-star", "always"): "Quiet-STaR's model, a new thought before each token",
}
BESIDE = "quiet-star", "always"  # what was trained is a thought before the answer
GOLD = {"steps": {("chains", "answers")}}  # right chains, which the others must find there
WAYS = {
    "none": "no thought",
    "another": "another problem's thought",
    "constant": "one constant thought",
    "random": "random tokens",
}
CHAIN = re.compile(r"\d+[+-]\d+=\d+, \d+[+-]\d+=\d+\)")  # that is written out, right or wrong
Arms = dict[str, dict[str, Any]]  # of a seed: by arm, what pretrained.py measured


def write(out: Path, problems: dict[str, list[Problem]], folder: Path) -> tuple[Path, str]:
    """Add what is in ``out`` to pretrained.json of a folder, write the tables of pretrained.md there; the page and verdicts."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pretrained.json"
    known = read_json(path, dict[str, Any]) if path.exists() else {}
    asked = {name: {part: [asdict(x) for x in some] for part, some in parts.items()} for name, parts in problems.items()}
    if known.get("problems", asked) != asked:
        raise ValueError(f"{path}: has results for other problems: move it away")
    results: dict[str, dict[str, Any]] = known.get("results", {})
    for seed in sorted({file.parent for file in out.glob("*/[0-9]*/*.json")}):
        found = {file.stem: read_json(file, dict[str, Any]) for file in sorted(seed.glob("*.json"))}
        arms = results.setdefault(seed.parent.name, {}).setdefault(seed.name, {})
        arms.update(found)
        # Of the rates that are tried, those of one arm are compared.
        starts = {(seed.parent.name == "tuning" and arm.split()[0], result.get("start")) for arm, result in arms.items()}
        if len(starts) > len(dict(starts)):
            raise ValueError(f"{path}: {seed.parent.name}, seed {seed.name}: arms of different starts: train them from one")
    results = rounded(results)
    write_whole(path, as_json({"problems": asked, "results": results}))
    blocks, verdicts = [], []
    for name, title in TITLES.items():
        if any("quiet-star" in arms for arms in results.get(name, {}).values()):
            found = Results(name, dict(sorted(results[name].items())), asked[name])
            verdicts.append(found.verdict().replace("*", ""))
            blocks += [f"### {title}", f"**{verdicts[-1]}**", found.better_steps(), *found.tables()]
            if can_draw():
                found.draw(folder / f"pretrained_{name}.png")
                blocks.append(f"![Rewards and right answers, by update](pretrained_{name}.png)")
    if any(" " in name for name in results.get("tuning", {}).get("99", {})):
        blocks += ["### Learning rates", tuned(results["tuning"]["99"], asked["form"]["valid"])]
    if "sums" in results:
        blocks += ["### The gate: sums alone", gate(results["sums"], asked["sums"]["valid"])]
    if results.get("gsm8k", {}).get("0", {}).keys() >= {"base", "plain", "quiet-star"}:
        found = gsm8k(results["gsm8k"]["0"])
        verdicts.append(found[0])
        blocks += ["### GSM8K", f"**{found[0]}**", *found[1:]]
    page = folder / "pretrained.md"
    write_block(page, "pretrained", "\n\n".join([*blocks, cost(results)]))
    return page, "\n".join(verdicts)


class Results:
    """Of a setting: by seed and arm, what was measured."""

    def __init__(self, name: str, seeds: dict[str, Arms], problems: dict[str, list[dict[str, Any]]]):
        self.name, self.seeds, self.problems = name, seeds, problems
        self.rows = {row: words for row, words in ROWS.items() if any(self.has(row, arms) for arms in seeds.values())}
        setting = SETTINGS[name]
        wanted = [row for row in ROWS if row[0] in ("warm", *setting.arms) and (setting.forced or row[1] != "forced")]
        self.rivals = [row for row in wanted if row not in {OURS, BESIDE, *GOLD.get(name, ())}]

    def has(self, row: tuple[str, str], arms: Arms) -> bool:
        return row[1] in arms.get(row[0], {})

    def share(self, row: tuple[str, str], arms: Arms, part: str) -> float:
        """Of right answers."""
        return right_share(arms[row[0]][row[1]][part]["texts"], self.problems[part])

    def gaps(self, row: tuple[str, str], part: str) -> list[float]:
        """By seed that has both, by how much more answers of ours are right."""
        both = [arms for arms in self.seeds.values() if self.has(row, arms) and self.has(OURS, arms)]
        return [self.share(OURS, arms, part) - self.share(row, arms, part) for arms in both]

    def verdict(self) -> str:
        """The claim: on new numbers more answers are right than of each rival, in the mean over seeds and in each seed."""
        claimed = {seed: self.seeds.get(seed, {}) for seed in map(str, SETTINGS[self.name].seeds)}
        having = {seed: arms for seed, arms in self.seeds.items() if self.has(OURS, arms)}
        missing = [f"{ROWS[x]}, seed {n}" for n, arms in claimed.items() for x in (OURS, *self.rivals) if not self.has(x, arms)]
        missing += [f"a claim on seed {seed}" for seed in having if seed not in claimed]
        compared = {row: self.gaps(row, "test") for row in self.rivals if any(self.has(row, arms) for arms in having.values())}
        if not compared:
            return "The claim is not tested yet: nothing to compare."
        bounds = {row: mean_interval(gaps) for row, gaps in compared.items()}
        mean, low, high = bounds[best := min(bounds, key=lambda row: bounds[row][0])]
        which = "is open"
        if any(top is not None and top < 0 for _, _, top in bounds.values()):
            which = "is refuted"
        elif (
            all(bottom is not None and bottom > 0 for _, bottom, _ in bounds.values()) and min(map(min, compared.values())) > 0
        ):
            which = "holds"
        if missing:
            which = f"is not tested yet, for lack of {'; '.join(missing[:3])}{' and others' if missing[3:] else ''}"
        interval = "" if low is None else f" ({low:+.2f} to {high:+.2f})"
        above = sum(min(gaps) > 0 for gaps in zip(*compared.values(), strict=False))
        return (
            f"The claim {which}. Quiet-STaR's right answers: {mean:+.2f}{interval} over those of the best rival, {ROWS[best]}; "
            f"above every rival in {above} of {len(having)} seeds."
        )

    def better_steps(self) -> str:
        """What the steps of the thoughts that answer gained, beside asides of the start and thoughts without the reward."""
        shown = []
        for row in (("warm", "aside"), ("no-reward", "answers")):
            both = [arms for arms in self.seeds.values() if self.has(OURS, arms) and self.has(row, arms)]
            gains = [self._right_chains(OURS, arms) - self._right_chains(row, arms) for arms in both]
            shown.append(f"{_mean(gains, '+')} over {ROWS[row]} ({sum(x > 0 for x in gains)} of {len(gains)} seeds)")
        ended = [f"{x[-1][0]} updates ({x[-1][1]:.2f})" for arms in self.seeds.values() if (x := arms["warm"].get("practice"))]
        after = f" Practice ended after {', '.join(ended)}." if ended else ""
        weights = [arms["quiet-star"]["metrics"]["weight"][-10:] for arms in self.seeds.values() if self.has(OURS, arms)]
        weight = f" Its mixing weight in the last updates: {_mean([fmean(x) for x in weights if x])}."
        return f"Right chains of Quiet-STaR's thoughts, new numbers: {', '.join(shown)}.{weight}{after}"

    def _right_chains(self, row: tuple[str, str], arms: Arms) -> float:
        asides = _asides(arms[row[0]][row[1]]["test"])
        return fmean(text.startswith(f"{x['chain']})") for text, x in zip(asides, self.problems["test"], strict=True))

    def tables(self) -> Iterator[str]:
        """Right answers, gains over rivals, chains, and what thoughts are worth."""
        lines = []
        for row, words in self.rows.items():
            of_parts = ([self.share(row, x, part) if self.has(row, x) else None for x in self.seeds.values()] for part in PARTS)
            lines.append([words, *(cell for shares in of_parts for cell in (*map(_number, shares), _mean(shares)))])
        heads = [f"{words}, {column}" for words in PARTS.values() for column in (*(f"seed {x}" for x in self.seeds), "mean")]
        yield f"Right answers:\n\n{markdown(['', *heads], lines)}"

        lines = []
        for row in [row for row in self.rivals if row in self.rows]:
            cells = [
                (gaps, _mean(gaps, "+"), f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}")
                for gaps in (self.gaps(row, x) for x in PARTS)
            ]
            lines.append([ROWS[row], *(cell for _, *shown in cells for cell in shown)])
        heads = [f"{words}{column}" for words in PARTS.values() for column in ("", ", seeds above 0")]
        yield f"Right answers of Quiet-STaR over each rival:\n\n{markdown(['', *heads], lines)}"

        lines = []
        for (arm, kind), words in self.rows.items():
            found = [arms[arm][kind][part] for part in PARTS for arms in self.seeds.values() if kind in arms.get(arm, {})]
            if any(CHAIN.search(text) for x in found for text in _asides(x)):
                lines.append([words, *(cell for part in PARTS for cell in self._chains((arm, kind), part))])
        heads = [f"{words}, {column}" for words in PARTS.values() for column in ("chains", "right, of chains")]
        yield f"What is thought or written before the answer:\n\n{markdown(['', *heads], lines)}"

        having = [arms["quiet-star"]["worth"] for arms in self.seeds.values() if "worth" in arms.get("quiet-star", {})]
        if having:
            lines = []
            for way, words in WAYS.items():
                gains = [[fmean(x[part][way]) - fmean(x[part]["own"]) for x in having] for part in PARTS]
                lines.append([words, *(_mean(values, "+") for values in gains)])
            yield (
                f"Gain in the log-probability of the answer, nats, of Quiet-STaR's own thoughts over others in their place:\n\n"
                f"{markdown(['', *PARTS.values()], lines)}"
            )

        lines = []
        for arm, words in (("warm", "the start"), ("quiet-star", "Quiet-STaR")):
            found = [
                (arms[arm]["sampled"]["test"], self.problems["test"])
                for arms in self.seeds.values()
                if "sampled" in arms.get(arm, {})
            ]
            counted = [_sampled(x["thoughts"], some) for x, some in found]
            if counted:
                lines.append([words, *(_mean(column) for column in zip(*counted, strict=True))])
        yield (
            "Four thoughts for each problem with new numbers, sampled as in training:\n\n"
            + markdown(["", "right chains", "problems with a right one", "with right ones and others"], lines)
        )
        yield self._examples()

    def _chains(self, row: tuple[str, str], part: str) -> list[str]:
        """The shares of asides that are chains, and of these that are right."""
        chains, right = [], []
        for arms in self.seeds.values():
            if self.has(row, arms):
                asides = _asides(arms[row[0]][row[1]][part])
                each = len(asides) // len(self.problems[part])
                written = [bool(CHAIN.match(text)) for text in asides]
                good = [text.startswith(f"{self.problems[part][i // each]['chain']})") for i, text in enumerate(asides)]
                chains.append(fmean(written))
                right.append(sum(good) / sum(written) if any(written) else None)
        return [_mean(chains), _mean(right)]

    def _examples(self, count: int = 4) -> str:
        """The first held-out problems with what was thought before and after training."""
        seed, arms = next((seed, arms) for seed, arms in self.seeds.items() if self.has(OURS, arms))
        before, after = (arms[arm][kind]["test"] for arm, kind in (("warm", "aside"), OURS))
        lines = []
        for i, problem in enumerate(self.problems["test"][:count]):
            thoughts = [f"`{_cut(_asides(x)[i])}`" for x in (before, after)]
            lines.append([problem["question"], *thoughts, after["texts"][i], str(problem["answer"])])
        head = ["problem", "the start's aside", "Quiet-STaR's thought", "its answer", "right"]
        return f"The first {count} problems with new numbers, seed {seed}:\n\n{markdown(head, lines)}"

    def draw(self, path: Path) -> None:
        """Learning curves, and right answers on new numbers: a point for each seed."""
        figure = new_figure(10, 3.8)
        curve, points = figure.subplots(1, 2, width_ratios=(4, 5))
        rows = list(self.rows)
        for number, (seed, arms) in enumerate(self.seeds.items()):
            rewards = arms.get("quiet-star", {}).get("metrics", {}).get("reward", [])
            curve.plot(range(1, 1 + len(rewards)), rewards, color=f"C{number}", linewidth=1, label=f"seed {seed}")
            shown = [row for row in rows if self.has(row, arms)]
            places = [len(rows) - rows.index(row) - 0.1 * number for row in shown]
            points.plot([self.share(row, arms, "test") for row in shown], places, "o", color=f"C{number}", markersize=4)
        curve.axhline(0, color="black", linewidth=0.8)
        curve.set(xlabel="update", ylabel="nats", title="mean reward of a thought")
        curve.legend(frameon=False)
        points.set_yticks([len(rows) - i - 0.1 for i in range(len(rows))], [ROWS[row].strip("*") for row in rows], fontsize=7)
        points.set(xlabel="right answers to problems with new numbers", xlim=(0, 1.02))
        save(figure, path)


def tuned(arms: Arms, problems: list[dict[str, Any]]) -> str:
    """The learning rates that were tried."""
    shares = {name: right_share(x["answers"]["valid"]["texts"], problems) for name, x in sorted(arms.items())}
    words = f"Right answers to problems for validation, with the seed for tuning; the start's {shares.pop('warm'):.2f}:\n\n"
    return words + markdown(["arm", "rate", "right answers"], [[*name.split(), f"{x:.2f}"] for name, x in shares.items()])


def gate(seeds: dict[str, Arms], problems: list[dict[str, Any]]) -> str:
    """Of the thoughts that a start samples about problems whose chains it never saw, how many are right."""
    found = [
        text.startswith(f"{problems[i * len(problems) // len(texts)]['chain']})")
        for arms in seeds.values() for texts in [arms["warm"]["sampled"]["valid"]["thoughts"]] for i, text in enumerate(texts)
    ]  # fmt: skip
    met = "met" if fmean(found) >= GATE else "not met"
    return f"{sum(found)} of {len(found)} sampled thoughts are right chains: the gate of {GATE} is {met}."


def gsm8k(arms: Arms) -> list[str]:
    """Whether own thoughts make right answers more probable than in each other row; the rows; what thoughts are worth."""
    rows = {
        "**Quiet-STaR, thinking**": ("quiet-star", "own"),
        "the same, another question's thoughts": ("quiet-star", "another"),
        "the same, one constant thought": ("quiet-star", "constant"),
        "the same, not thinking": ("quiet-star", "none"),
        "plain training on four times the text": ("plain", "none"),
        "before training": ("base", "none"),
    }
    logp = {words: (arms[arm]["right"][way], arms[arm]["other"][way]) for words, (arm, way) in rows.items()}
    p = {words: list(map(math.exp, right)) for words, (right, _) in logp.items()}
    ours, *rivals = rows
    gaps = {words: _less(p[ours], p[words]) for words in rivals}
    which = "holds" if all(_interval(gap)[1] > 0 for gap in gaps.values()) else "does not hold"
    lines = [
        [words, _small(p[words]), _small(gaps[words], "+") if words in gaps else "", _small(_less(*logp[words]), "+")]
        for words in rows
    ]
    head = [
        f"probability of the right answer, mean over {len(p[ours])} questions",
        "Quiet-STaR, thinking, over it",
        "log p over another answer's that is as long, nats",
    ]
    return [
        f"The claim {which}: right answers are more probable with own thoughts than in every other row.",
        markdown(["", *head], lines),
        _worth_in_text(arms["quiet-star"]["text"]),
    ]


def _worth_in_text(text: dict[str, Any]) -> str:
    """Losses by thoughts, at temperature 1 and at one that is fitted on the other half of the texts."""
    temperatures, nats = text["temperatures"], text["nats"]
    fitted = {way: min(range(len(temperatures)), key=lambda i: fmean(x[i] for x in nats[way][::2])) for way in nats}

    def loss(way: str, temperature: int) -> list[float]:
        return [x[temperature] for x in nats[way][1::2]]

    one = temperatures.index(1.0)
    own = loss("own", one), loss("own", fitted["own"])
    lines = []
    for way, words in {"own": "own thoughts", **WAYS}.items():
        gains = [_less(loss(way, one), own[0]), _less(loss(way, fitted[way]), own[1])]
        shown = ["", ""] if way == "own" else [_small(gain, "+") for gain in gains]
        weight = f"{fmean(text['weights'][way]):.2f}" if way in text["weights"] else ""
        lines.append([words, f"{fmean(loss(way, one)):.4f}", *shown, f"{temperatures[fitted[way]]:g}", weight])
    head = ["", "loss", "own thoughts over it", "each at its temperature", "that temperature", "mixing weight"]
    words = (
        "What thoughts are worth in the test's solutions, where they stand: the loss of the next token, nats, on every other "
        "text; temperatures of the prediction are fitted on the rest"
    )
    return f"{words}:\n\n{markdown(head, lines)}"


def _less(some: Sequence[float], others: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(some, others, strict=True)]


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the lower end of its interval."""
    mean, low, _ = mean_interval(values)
    return mean, mean if low is None else low


def _small(values: Sequence[float], sign: str = "") -> str:
    mean, low = _interval(values)
    return f"{mean:{sign}.4f} ± {mean - low:.4f}"


def cost(results: dict[str, dict[str, Arms]]) -> str:
    some = [found for seeds in results.values() for arms in seeds.values() for found in arms.values()]
    dates, versions, machines = (sorted({found[name] for found in some}) for name in ("date", "torch", "machine"))
    hours = sum(found["seconds"] for found in some) / 3600
    between = " to ".join(dict.fromkeys([dates[0], dates[-1]]))
    return f"All parts took {hours:.1f} hours together, on {'; '.join(machines)}; torch {', '.join(versions)}; {between}."


def right_share(texts: Sequence[str], problems: Sequence[dict[str, Any]]) -> float:
    """Of problems, how many are answered by the text about each; of several texts about each by their most frequent answer."""
    times = len(texts) // len(problems)
    groups = [texts[i : i + times] for i in range(0, len(texts), times)]
    return fmean(vote(group) == f" {problem['answer']}." for group, problem in zip(groups, problems, strict=True))


def vote(texts: Sequence[str]) -> str:
    """The most frequent of the answers behind some asides, the first of equals; "" if there is none."""
    answers = [answer for text in texts if re.fullmatch(r" \d+\.", answer := without_aside(text))]
    return Counter(answers).most_common(1)[0][0] if answers else ""


def _asides(found: dict[str, list[str]]) -> list[str]:
    """Thoughts, or what is written from the bracket on."""
    return found["thoughts"] if "thoughts" in found else [text.removeprefix(" (") for text in found["texts"]]


def _sampled(thoughts: Sequence[str], problems: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """The share of right chains; of problems with one, and with one and another thought."""
    each = len(thoughts) // len(problems)
    right = [
        [text.startswith(f"{problem['chain']})") for text in thoughts[each * i : each * (i + 1)]]
        for i, problem in enumerate(problems)
    ]
    return fmean(x for row in right for x in row), fmean(map(any, right)), fmean(len(set(row)) > 1 for row in right)


def _cut(thought: str) -> str:
    """An aside without what follows its bracket."""
    aside, bracket, _ = thought.partition(")")
    return f"{aside}{bracket}".replace("\n", "\\n").replace("|", "\\|").replace("`", "'")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mean(values: Sequence[float | None], sign: str = "") -> str:
    """The mean over seeds and, of several, its 95 % interval by Student's t."""
    known = [x for x in values if x is not None]
    if not known:
        return ""
    mean, low, _ = mean_interval(known)
    return f"{mean:{sign}.2f}" if low is None else f"{mean:{sign}.2f} ± {mean - low:.2f}"
