"""docs/pretrained.md from the results of pretrained.py: the claim, every arm and control, the rival, a picture and thoughts."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Any

from digit_sums_report import rounded
from experiments_report import markdown
from pretrained_evaluation import chains
from pretrained_problems import Problem

from benchmarks.report.committed import as_json, write_block
from quietstar.evaluation.intervals import mean_interval, wilson
from quietstar.files.pictures import can_draw, new_figure, save
from quietstar.files.reading import read_json
from quietstar.files.writing import write_whole

PARTS = {"test": "new numbers", "new": "new stories"}
WAYS = {
    "none": "no thought",
    "own": "own thoughts",
    "another": "another problem's thoughts",
    "constant": "one constant thought",
    "random": "random tokens",
}
FREE = {"base": WAYS["none"], "another": "another text's thoughts", "constant": WAYS["constant"], "random": WAYS["random"]}
HEAD = "mixing-head-alone"
WAYS_TO_LEARN = {  # that the claim is made for
    "quiet-star": "the published policy term",
    "temperature-1-signed": "temperature 1 and signed advantages",
}
SUGGESTED = {"temperature-1-signed": "seeds 0 and 1 had suggested these changes, so that only later seeds are fresh"}
EACH_CHANGE = {"temperature-1": "temperature 1 alone", "signed": "signed advantages alone"}
NAMES = {
    "warm": "the warm start",
    **WAYS_TO_LEARN,
    **EACH_CHANGE,
    HEAD: "a mixing head alone",
    "no-reinforce-rehearsal": "no REINFORCE, with rehearsal",
    "plain-4-times-the-text": "plain training on four times the text",
    "grpo-written-chains": "GRPO",
}
# The claim: own thoughts over each of these, an arm (or the same) and a way, above 0 in every seed on new numbers.
CLAIM = {
    "no thought": ("", "none"),
    "another problem's thoughts": ("", "another"),
    "one constant thought": ("", "constant"),
    "the warm start's own thoughts, with a mixing head trained on them": (HEAD, "own"),
}
BESIDES = {
    "random tokens": ("", "random"),
    "no REINFORCE, with rehearsal": ("no-reinforce-rehearsal", "own"),
    "plain training on four times the text": ("plain-4-times-the-text", "none"),
}
GATE = 0.85
Results = dict[str, Any]  # of a seed: by arm, what pretrained.py measured


def collect(out: Path) -> tuple[list[Results], Results | None]:
    """All results of the seeds in a folder, and those on free text."""
    free = out / "free-text.json"
    seeds = sorted(out.glob("seed-*"), key=lambda folder: int(folder.name.split("-")[1]))
    found = [{file.stem: read_json(file, dict[str, Any]) for file in sorted(seed.glob("*.json"))} for seed in seeds]
    return found, read_json(free, dict[str, Any]) if free.exists() else None


def write(seeds: list[Results], free: Results | None, problems: dict[str, list[Problem]], folder: Path) -> tuple[Path, str]:
    """Write pretrained.json and the generated part of pretrained.md; returns the page, and what it says of the claim."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "pretrained.json", as_json(rounded({"seeds": seeds, "free_text": free})))
    learned = [arm for arm in WAYS_TO_LEARN if all(arm in results for results in seeds)]
    verdicts = [verdict(seeds, arm) for arm in learned]
    blocks = [*(f"**{words}**" for words in verdicts), seedsmarkdown(seeds), *(claimmarkdown(seeds, arm) for arm in learned)]
    blocks += [sampledmarkdown(seeds), writingmarkdown(seeds, problems)]
    if learned and can_draw():
        draw(seeds, learned, folder / "pretrained.png")
        blocks.append("![Reward of each update, and the gain of own thoughts over each control](pretrained.png)")
    blocks += [some_thoughts(seeds[0], learned, problems["test"]), *([free_text(free)] if free else []), cost(seeds)]
    page = folder / "pretrained.md"
    write_block(page, "pretrained", "\n\n".join(blocks))
    return page, "\n".join(verdicts)


def verdict(seeds: list[Results], ours: str) -> str:
    """Whether the claim holds for an arm; each seed counts, and each control."""
    rows = [row for seed, results in enumerate(seeds) for row in gains(results, ours, seed, CLAIM) if row[0] == "test"]
    missed = [f"over {name} in seed {seed}" for _, name, seed, _, low, _ in rows if low is None or low <= 0]
    said = f"With {WAYS_TO_LEARN[ours]} the claim"
    if missed:
        return f"{said} does not hold: own thoughts gain nothing that is certain {'; '.join(missed)}."
    held = f"{said} holds in {len(seeds)} of {len(seeds)} seeds: own thoughts gain over each of its {len(CLAIM)} controls"
    return f"{held}; {SUGGESTED[ours]}." if ours in SUGGESTED else f"{held}."


def gains(results: Results, ours: str, seed: int, controls: dict[str, tuple[str, str]]) -> list[tuple]:
    """(part, control, seed, mean, low, high): nats that own thoughts of an arm gain over each control, problem by problem."""
    rows = []
    for part in PARTS:
        for name, (arm, way) in controls.items():
            if not arm or arm in results:
                own, theirs = (results[a]["answers"][part][w]["nats"] for a, w in ((ours, "own"), (arm or ours, way)))
                differences = [y - x for x, y in zip(own, theirs, strict=True)]
                rows.append((part, name, seed, *mean_interval(differences)))
    return rows


def claimmarkdown(seeds: list[Results], ours: str) -> str:
    """A line for each control and part, a column for each seed."""
    rows = [row for seed, results in enumerate(seeds) for row in gains(results, ours, seed, CLAIM | BESIDES)]
    lines = []
    for part, words in PARTS.items():
        for name in dict.fromkeys(row[1] for row in rows if part == "test" or row[1] in CLAIM):
            found = [_interval(*row[3:]) for row in rows if row[:2] == (part, name)]
            lines.append([f"{name}{'' if name in CLAIM else ' (not part of the claim)'}", words, *found])
    head = [f"{WAYS_TO_LEARN[ours]}: own thoughts, over", "problems", *(f"seed {seed}" for seed in range(len(seeds)))]
    return f"Gain in the log-probability of the answer, nats, with 95 % intervals over problems:\n\n{markdown(head, lines)}"


def seedsmarkdown(seeds: list[Results]) -> str:
    """Share of right answers to problems with new numbers, by seed: with own thoughts, after a written chain, or at once."""
    lines = []
    for arm, name in NAMES.items():
        for way, words in (("none", "no thought"), ("own", "own thoughts"), ("written", "a written chain")):
            row = [_right(results.get(arm, {}), way) for results in seeds]
            if any(row):
                lines.append([name, words, *row])
    head = ["trained", "answers after", *(f"seed {seed}" for seed in range(len(seeds)))]
    return f"Right answers to problems with new numbers:\n\n{markdown(head, lines)}"


def _right(result: Results, way: str) -> str:
    found = {**result.get("answers", {}).get("test", {}), "written": result.get("written", {}).get("test")}.get(way)
    return f"{fmean(found['right']):.2f}" if found else ""


def sampledmarkdown(seeds: list[Results]) -> str:
    """What the policy term had to choose from, before and after."""
    lines = []
    for arm in NAMES:
        found = [results[arm]["sampled"] for results in seeds if "sampled" in results.get(arm, {})]
        if found:
            values = [
                [x[name] for x in found if x[name] is not None] for name in ("right", "mixed", "reward_right", "reward_other")
            ]
            lines.append([_named(arm, seeds), *(_mean(column) if column else "" for column in values)])
    head = ["trained", "right chains", "problems with right ones and others", "reward of right ones, nats", "of others"]
    return f"Four thoughts for each problem with new numbers, sampled as in training:\n\n{markdown(head, lines)}"


def _named(arm: str, seeds: list[Results]) -> str:
    """Also the seeds, if not all have it."""
    having = [str(seed) for seed, results in enumerate(seeds) if arm in results]
    return NAMES[arm] if len(having) == len(seeds) else f"{NAMES[arm]} (seed {', '.join(having)})"


def writingmarkdown(seeds: list[Results], problems: dict[str, list[Problem]]) -> str:
    """What models write that may write a chain, and how often thoughts are chains."""
    lines = []
    for arm in ("warm", "grpo-written-chains"):
        found = [results[arm]["written"] for results in seeds if arm in results]
        if found:
            shares = _chains(found, problems, lambda x: [text.removeprefix(" (") for text in x["texts"]])
            lines.append([f"{_named(arm, seeds)}, writing", *shares])
    for arm in ("warm", *WAYS_TO_LEARN, *EACH_CHANGE):
        found = [results[arm]["answers"] for results in seeds if arm in results]
        if found:
            lines.append([f"{_named(arm, seeds)}, thinking", *_chains(found, problems, lambda x: x["thoughts"])])
    columns = ("a chain", "the right chain", "right answer")
    head = ["", *(f"{what}, {words}" for words in PARTS.values() for what in columns)]
    gate = [_of_written(results["warm"], problems) for results in seeds]
    met = "met" if min(right / (count or 1) for right, count in gate) >= GATE else "not met"
    counted = ", ".join(_share(right, count) for right, count in gate)
    return (
        f"Shares of problems whose greedy text or thought is a chain. Of the chains that the warm start writes these are "
        f"right, by seed: {counted}. The gate, {GATE} in each seed, is {met}.\n\n{markdown(head, lines)}"
    )


def _share(right: int, count: int) -> str:
    low, high = wilson(right, count) if count else (0.0, 1.0)
    return f"{right} of {count} ({low:.2f} to {high:.2f})"


def _chains(found: list[dict[str, Any]], problems: dict[str, list[Problem]], texts: Any) -> list[str]:
    row = []
    for part in PARTS:
        shares = [chains(texts(x[part]), problems[part]) for x in found]
        right = [fmean(x[part]["right"] if "right" in x[part] else x[part]["own"]["right"]) for x in found]
        row += [_mean([x["written"] for x in shares]), _mean([x["right"] for x in shares]), _mean(right)]
    return row


def _of_written(warm: Results, problems: dict[str, list[Problem]]) -> tuple[int, int]:
    """The right ones among the chains that the warm start writes, and the number of these."""
    shares = chains([text.removeprefix(" (") for text in warm["written"]["test"]["texts"]], problems["test"])
    return round(shares["right"] * len(problems["test"])), round(shares["written"] * len(problems["test"]))


def some_thoughts(results: Results, learned: Sequence[str], problems: Sequence[Problem], count: int = 4) -> str:
    """The first held-out problems with what was thought before and after training, and what it did in the last arm."""
    found = [results[arm]["answers"]["test"] for arm in ("warm", *learned)]
    lines = []
    for i, problem in enumerate(problems[:count]):
        p = [f"{exp(-found[-1][way]['nats'][i]):.2f}" for way in ("none", "own")]
        thoughts = [f"`{_cut(x['thoughts'][i])}`" for x in found]
        lines.append([problem.question, *thoughts, str(problem.answer), *p])
    head = ["problem", *(f"thought, {NAMES[arm]}" for arm in ("warm", *learned)), "answer", "p without", "p with"]
    return f"The first {count} problems of the test, in seed 0:\n\n{markdown(head, lines)}"


def _cut(thought: str) -> str:
    """An aside without what follows its bracket."""
    aside, bracket, _ = thought.partition(")")
    return f"{aside}{bracket}".replace("\n", "\\n").replace("|", "\\|").replace("`", "'")


def free_text(free: Results) -> str:
    """What was expected of free text, and what came out."""
    losses = free["losses"]
    found = {
        name: mean_interval([x - y for x, y in zip(losses[way], losses["own"], strict=True)]) for way, name in FREE.items()
    }
    lines = [[name, _interval(*values, digits=4)] for name, values in found.items()]
    low = found[FREE["constant"]][1]
    came = "That came out" if low is None or low <= 0 else "It is larger than 0"
    text = "Python's manual" if free["text"] == "builtin" else free["text"]
    return (
        f"On free text ({text}, {free['texts']} texts held out) no gain over a constant thought was expected. {came}:"
        f"\n\n{markdown(['own thoughts, over', 'nats per token where the model thinks'], lines)}"
    )


def cost(seeds: list[Results]) -> str:
    spent = []
    for results in seeds:
        machines = " and ".join(dict.fromkeys(result["machine"] for result in results.values()))
        spent.append(f"{sum(result['seconds'] for result in results.values()) / 60:.0f} minutes on {machines}")
    some = [result for results in seeds for result in results.values()]
    dates, versions = (sorted({result[name] for result in some}) for name in ("date", "torch"))
    measured = f"a part that was stopped counts from its last start; torch {', '.join(versions)}, {dates[-1]}"
    return f"The parts of each seed, added up, took {', '.join(spent)}; {measured}."


def draw(seeds: list[Results], learned: Sequence[str], path: Path) -> None:
    """Learning curves, and the gains on new numbers: a colour for each arm, a point for each seed."""
    figure = new_figure(10, 3.8)
    curve, bars = figure.subplots(1, 2, width_ratios=(4, 5))
    names = list(CLAIM | BESIDES)
    for number, arm in enumerate(learned):
        colour = f"C{number}"
        for seed, results in enumerate(seeds):
            rewards = results[arm]["metrics"]["reward"]
            label = WAYS_TO_LEARN[arm] if seed == 0 else None
            curve.plot(range(1, 1 + len(rewards)), rewards, color=colour, linewidth=1, label=label)
            rows = [row for row in gains(results, arm, seed, CLAIM | BESIDES) if row[0] == "test"]
            places = [len(names) - names.index(row[1]) - 0.25 * number - 0.07 * seed for row in rows]
            whiskers = [[row[3] - row[4] for row in rows], [row[5] - row[3] for row in rows]]
            bars.errorbar([row[3] for row in rows], places, xerr=whiskers, fmt="o", color=colour, capsize=2, markersize=3)
    curve.axhline(0, color="black", linewidth=0.8)
    curve.set(xlabel="update", ylabel="nats", title="mean reward of a thought")
    curve.set_ylim(top=1.25 * curve.get_ylim()[1])  # room for the legend
    curve.legend(frameon=False)
    bars.axvline(0, color="black", linewidth=0.8)
    bars.set_yticks([len(names) - i - 0.25 for i in range(len(names))], [name.split(",")[0] for name in names])
    bars.set(xlabel="nats", title="gain of own thoughts over")
    save(figure, path)


def _interval(mean: float, low: float | None, high: float | None, digits: int = 2) -> str:
    shown = [f"{x:+.{digits}f}" for x in (mean, low, high) if x is not None]
    return shown[0] if low is None else f"{shown[0]} ({shown[1]} to {shown[2]})"


def _mean(values: Sequence[float]) -> str:
    """The mean over seeds and, of several, its interval."""
    mean, low, _ = mean_interval(list(values))
    return f"{mean:.2f}" if low is None else f"{mean:.2f} ± {mean - low:.2f}"
