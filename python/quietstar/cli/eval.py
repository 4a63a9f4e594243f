"""``quietstar eval``"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from quietstar.cli.errors import UsageError
from quietstar.cli.loading import load_checkpoint, text_tokenizer
from quietstar.cli.shared_options import Checkpoint, check_report_file
from quietstar.cli.tables import held_out_losses
from quietstar.data.texts import DataConfig, load_data
from quietstar.evaluation import anchor_choices, difficulty
from quietstar.evaluation.losses import summary, token_losses
from quietstar.files.writing import write_whole


@dataclass
class Eval:
    """Measure the gain from thoughts on held-out text. For questions, see ask."""

    model: Checkpoint
    data: DataConfig
    all: Annotated[bool, arg(help="use every text of the data, if the model was not trained on it")] = False
    batch_size: Annotated[int, arg(help="texts at a time")] = 8
    out: Annotated[str, arg(help="JSON file of the results; the plot gets the same name with .png")] = "eval.json"

    def run(self) -> None:
        check_report_file(self.out, self.data.data)
        if self.batch_size < 1:
            raise UsageError(f"--batch-size must be 1 or more, got {self.batch_size}")
        qs = load_checkpoint(self.model)
        config = replace(self.data, pack=False, held_out=0) if self.all else self.data
        data = load_data(config, text_tokenizer(qs), qs.thought_config.lookahead)
        examples = data.train if self.all else data.held_out
        losses = token_losses(qs, examples, self.batch_size, sys.stderr.isatty())
        figures, tenths = summary(losses), difficulty.by_difficulty(losses)
        by_choice = anchor_choices.by_anchor_choice(qs, examples, losses, self.batch_size)
        print(f"{held_out_losses(figures)}\n{difficulty.text(tenths)}\n{anchor_choices.text(by_choice)}")
        values = {"model": self.model, **asdict(self.data), **figures, "by_difficulty": tenths, "by_anchor_choice": by_choice}
        write_whole(self.out, json.dumps(values, indent=2) + "\n")
        if difficulty.can_draw():
            difficulty.draw(tenths, Path(self.out).with_suffix(".png"))
        else:
            print("no plot: matplotlib is not installed")
