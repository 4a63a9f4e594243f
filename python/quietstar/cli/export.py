"""``quietstar export``"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, ClassVar

from tyro.conf import arg

from quietstar.cli.common import Checkpoint, check_out_file, load_checkpoint, text_tokenizer
from quietstar.cli.errors import UsageError
from quietstar.cli.ignored import DATA
from quietstar.data.texts import DataConfig, load_data
from quietstar.data.thoughts import export_thoughts


@dataclass
class Export:
    """Sample thoughts about a data set's training texts, and write them to a file."""

    model: Checkpoint
    data: DataConfig
    out: Annotated[str, arg(metavar="FILE", help="a .jsonl or .parquet file to write, for --thoughts-from of train")]
    seed: Annotated[int, arg(help="seed of the thoughts")] = 0
    batch_size: Annotated[int, arg(help="texts at a time")] = 8

    inherits: ClassVar = (DataConfig,)
    ignored: ClassVar = DATA

    def run(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"--batch-size must be 1 or more, got {self.batch_size}")
        check_out_file(self.out, self.data.data)
        qs = load_checkpoint(self.model)
        examples = load_data(self.data, text_tokenizer(qs), qs.thought_config.lookahead).train
        export_thoughts(qs, examples, self.out, self.seed, self.batch_size, sys.stderr.isatty())
        print(f"wrote thoughts about {len(examples):,} texts to {self.out}")
