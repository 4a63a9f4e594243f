"""``quietstar export``"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from tyro.conf import arg

from quietstar.cli.common import Checkpoint, check_out_file, load_checkpoint, text_tokenizer
from quietstar.cli.errors import UsageError
from quietstar.cli.ignored import DATA, Rule
from quietstar.data.filtering import ThoughtFilter
from quietstar.data.texts import DataConfig, load_data
from quietstar.data.thoughts import export_thoughts


@dataclass
class Export:
    """Sample thoughts about a data set's training texts, and write them to a file."""

    model: Checkpoint
    data: DataConfig
    filter: ThoughtFilter
    out: Annotated[str, arg(metavar="FILE", help="a .jsonl or .parquet file to write, for --thoughts-from of train")]
    seed: Annotated[int, arg(help="seed of the thoughts")] = 0
    batch_size: Annotated[int, arg(help="texts at a time")] = 8
    thoughts: Annotated[int | None, arg(help="N, thoughts to sample at each anchor; default as the model's config says")] = None

    inherits: ClassVar[tuple] = (DataConfig,)
    ignored: ClassVar[list] = [*DATA, Rule("min_gain max_length leaks", lambda o: not o.keep, "without --keep")]

    def run(self) -> None:
        for name, value in (("batch-size", self.batch_size), ("thoughts", self.thoughts)):
            if value is not None and value < 1:
                raise UsageError(f"--{name} must be 1 or more, got {value}")
        check_out_file(self.out, self.data.data)
        qs = load_checkpoint(self.model)
        if self.thoughts is not None:
            qs.use_config(replace(qs.thought_config, thoughts=self.thoughts))
        examples = load_data(self.data, text_tokenizer(qs), qs.thought_config.lookahead).train
        counts = export_thoughts(qs, examples, self.out, self.seed, self.batch_size, sys.stderr.isatty(), self.filter)
        print(f"wrote thoughts about {len(examples):,} texts to {self.out}")
        if counts:
            print(f"kept {counts.pop('kept'):,} of {counts.pop('sampled'):,} thoughts; left out:")
            print("\n".join(f"{count:>9,} {reason}" for reason, count in counts.items()))
