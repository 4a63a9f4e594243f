"""``quietstar eval``"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import arg

from quietstar.checkpoints.contents import TrainedOn
from quietstar.checkpoints.places import checkpoint_of, run_of
from quietstar.cli import common, errors
from quietstar.cli.ignored import DATA, Rule
from quietstar.data.texts import Data, DataConfig, load_all, load_data
from quietstar.evaluation import difficulty
from quietstar.evaluation.losses import summary, token_losses
from quietstar.files.pictures import can_draw
from quietstar.files.writing import write_whole


@dataclass
class Eval:
    """Measure the gain from thoughts on held-out text; of a run, on what it held out. For questions, see ask."""

    model: common.Checkpoint
    data: DataConfig
    all: Annotated[bool, arg(help="use every text of the data, also those that the model was trained on")] = False
    batch_size: Annotated[int, arg(help="texts at a time")] = 8
    controls: common.Controls = True
    out: Annotated[
        str, arg(help="JSON file of the results, with a plot beside it; default a new one in the run's folder, or here")
    ] = ""

    inherits: ClassVar[tuple] = (DataConfig,)
    ignored: ClassVar[list] = [Rule("held_out held_out_seed held_out_split", lambda o: o.all, "with --all"), *DATA]

    def run(self) -> None:
        if self.out:
            common.check_report_file(self.out, self.data.data)
        if self.batch_size < 1:
            raise errors.UsageError(f"--batch-size must be 1 or more, got {self.batch_size}")
        qs = common.load_checkpoint(self.model)
        cut = self.data, common.text_tokenizer(qs), qs.thought_config.lookahead
        if self.all:
            examples = load_all(*cut)
            which = f"all {len(examples):,} texts"
        else:
            data = load_data(*cut)
            self._check_unseen(qs.trained_on, data)
            examples, which = data.held_out, common.held_out_text(data)
        print(f"{common.source_name(self.data.data)}: {which}, {self.data.length} tokens of each at most")
        losses = token_losses(qs, examples, self.batch_size, sys.stderr.isatty(), self.controls)
        figures, tenths = summary(losses), difficulty.by_difficulty(losses)
        by_choice = difficulty.by_anchor_choice(qs, examples, losses, self.batch_size)
        print(f"{common.held_out_losses(figures)}\n{difficulty.difficulty_text(tenths)}\n{difficulty.anchor_text(by_choice)}")
        values = {
            "model": self.model,
            **asdict(self.data),
            "all": self.all,
            **figures,
            "by_difficulty": tenths,
            "by_anchor_choice": by_choice,
        }
        written = [Path(self.out) if self.out else new_report(self.model)]
        write_whole(written[0], json.dumps(values, indent=2) + "\n")
        if can_draw():
            written.append(written[0].with_suffix(".png"))
            difficulty.draw(tenths, written[1])
        print(f"wrote {' and '.join(map(str, written))}" + ("" if written[1:] else "; no plot: matplotlib is not installed"))

    def _check_unseen(self, trained_on: Sequence[TrainedOn], data: Data) -> None:
        if not data.held_out:
            why = f"the {data.repeated} held-out texts occur in training too" if data.repeated else "no text is held out"
            raise ValueError(
                f"{self.data.data}: {why} (of {data.texts:,}, held-out {self.data.held_out}): --all measures all texts"
            )
        if not trained_on:
            print(f"{self.model} doesn't say what it was trained on: make sure that it was not these texts", file=sys.stderr)
        common.check_unseen(self.model, trained_on, self.data, data, "leave out these options, or measure all texts with --all")


def new_report(model: str) -> Path:
    """A file that is not there yet: in the run's folder, named after the checkpoint, or in the working folder."""
    run = run_of(model)
    stem = f"eval-{Path(checkpoint_of(model)).name}" if run else "eval"
    names = (f"{stem}.json" if number == 1 else f"{stem}-{number}.json" for number in count(1))
    return next(path for name in names if not (path := (run or Path()) / name).exists())
