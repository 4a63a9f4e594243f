"""``quietstar merge``"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from quietstar.checkpoints.pretrained import save_model
from quietstar.cli.common import Checkpoint, check_out_folder
from quietstar.cli.errors import UsageError
from quietstar.files.writing import replaced
from quietstar.model import QuietStar


@dataclass
class Merge:
    """Write only a checkpoint's language model, its adapters merged, for other libraries and servers."""

    model: Checkpoint
    out: Annotated[str, arg(metavar="FOLDER", help="a new folder, for weights, config, tokenizer and chat template")] = "merged"

    def run(self) -> None:
        check_out_folder(self.out)
        if os.path.lexists(self.out):
            raise UsageError(f"--out must be a new folder, and {self.out} exists")
        qs = QuietStar.from_pretrained(self.model)
        if qs.base is not None:
            qs.merge_adapters()
        with replaced(self.out) as beside:
            save_model(qs.model, qs.tokenizer, beside)
        print(f"wrote a {type(qs.model).__name__} to {self.out}")
