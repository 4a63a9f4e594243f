"""docs/digit-sums.md, its plots and its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sums.plots import draw
from sums.report import machine, verdict
from sums.results import Results, pooled, total, write_json
from sums.runs import EQUALS_ONLY, EVERYWHERE, FROZEN, NO_REINFORCE_REHEARSED, PLAIN, QUIET_STAR, SHUFFLED, Setting
from sums.tables import as_markdown, checks_table, main_table, positions_table, seeds_table, thoughts_table


def write_docs(results: Results, folder: Path) -> None:
    """Write digit-sums.md, its plots, and digit_sums.json, which has every number on the page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(results, folder / "digit_sums.json")
    draw(results, folder)
    (folder / "digit-sums.md").write_text(docs_page(results), encoding="utf-8")


def mean_loss(rows: list[dict[str, Any]]) -> float:
    """Of greedy thoughts, nats."""
    return sum(row["greedy"]["nll"] for row in rows) / len(rows)


def docs_page(results: Results) -> str:
    def share(setting: Setting, run: str, how: str = "sampled") -> str:
        right, lines = total(runs[setting.name, run], how)
        return f"{right / lines:.2f}"

    runs = {(group["setting"], group["run"]): group["rows"] for group in pooled(results)}
    best, everywhere = (share(setting, QUIET_STAR.name) for setting in (EQUALS_ONLY, EVERYWHERE))
    shuffled = share(EQUALS_ONLY, SHUFFLED, "greedy")
    own, other = (mean_loss(runs[EQUALS_ONLY.name, run]) for run in (QUIET_STAR.name, SHUFFLED))
    frozen, rehearsed, plain = (share(EQUALS_ONLY, run) for run in (FROZEN.name, NO_REINFORCE_REHEARSED.name, PLAIN))
    lines = results["seeds"][0]["rows"][0]["sampled"]["lines"]
    return f"""# Digit sums: does thinking help?

Yes, on text that shows how. A small model that thinks before the answer gets {best} of the held-out sums right; without
thinking it gets {plain}, which is chance. [examples/digit_sums.py](../examples/digit_sums.py) runs the experiment and writes
this page:

```sh
python examples/digit_sums.py --quick             # one seed, every position thinks, some controls
python examples/digit_sums.py --seeds {len(results["seeds"])} --docs docs   # everything on this page
```

All numbers are from [digit_sums.json](digit_sums.json): {machine(results)}

## The task

A line is five digits and the last digit of their sum. A Llama of three layers and width 64 is pretrained on such lines, some
with an aside before the answer. An aside either has the running sums, which lead to the answer, or repeats the first four
digits, which is more frequent and of no use:

```
7 5 8 6 2 = 8
7 5 8 6 2 = - 2 0 6 8 - 8
7 5 8 6 2 = - 7 5 8 6 - 8
```

Quiet-STaR then trains it on lines without an aside. A random tenth of all digit strings is held out from both. A model of this
size and training can't compute the answer in one pass: without thinking it can only guess. A thought of four tokens has room
for the running sums. Its reward is how much it improves the prediction.

## What was measured

- **Exact match**: the most likely token after "=" is the answer, on {lines} held-out lines per seed. The 95 % interval is
  Wilson's; it covers the choice of lines, not the seeds.
- **Loss**: of the answer, in nats. A guess has 2.30.
- **Right thoughts**: the share of sampled thoughts with all four running sums right. **Distinct**: the number of different
  greedy thoughts of one seed.
- **Seconds**: of training alone, on a machine that was also doing other work.

{as_markdown(*main_table(results))}

![Exact match of every run, with intervals](digit_sums_controls.png)

The runs:

- **Another line's thoughts**: the trained model, given the greedy thoughts of other lines. It gets {shuffled}, so what counts
  is what a thought says, not the computation it costs. The loss is {other:.2f} with them and {own:.2f} with the
  model's own greedy ones, so the gain of content is {other - own:.2f} nats.
- **Pause tokens, random digits**: thoughts of the same length that say nothing, in training and evaluation.
- **Untrained thoughts, w = 1**: the answer from what the pretrained model writes after the dash, before any training.
- **Frozen model, mixing head trained**: the best use of these untrained thoughts, {frozen}.
- **No REINFORCE**: the policy weight is 0. On its own this control is unfair, because lines without asides make the model
  forget how to write them. With rehearsal (64 lines of the pretraining text in every step) it keeps its asides and gets
  {rehearsed}.
- **Plain language model**: next-token training on the same lines, four times as many per step.
- **Start and end stored at 1/100**: as in the published code (`embedding_scale=100`), which multiplies their learning rate
  by 100. All other runs use 1.

Each seed separately, with sampled thoughts where a run has both kinds:

{as_markdown(*seeds_table(results))}

![Exact match over the steps](digit_sums_learning.png)

## Where it thinks

With a thought at every position, as in the paper, {everywhere} of the answers are right. The mixing weight w shows that the
thoughts are used at "=", just before the token that needs them.

{as_markdown(*positions_table(results))}

![Mixing weight and gain at each position](digit_sums_where.png)

w alone is no evidence. Where base and mixed prediction agree, as with pause tokens, it can take any value.

## Some thoughts

These were sampled at "=" on held-out lines by the first seed's model, before and after training.

{as_markdown(*thoughts_table(results))}

## What it does not show

The text shows two kinds of asides. From the reward of the next token alone, Quiet-STaR finds out which kind helps, where to
think, and how far to trust a thought. It does not invent a way of reasoning here: if pretraining has not taught the running
sums, nothing is gained, which is why each seed must first pass a gate. These results also don't show that thinking improves
ordinary text at this size, and say nothing about models with billions of weights. [limits.md](limits.md) has more.

## Thresholds

They were set before these runs, from the results of a prototype. {verdict(results)}

{as_markdown(*checks_table(results))}
"""
