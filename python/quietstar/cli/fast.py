"""``quietstar fast``"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quietstar.checkpoints import native
from quietstar.cli.loading import check_unseen
from quietstar.cli.shared_options import AllowBin, LanguageModel, ResumeRun, WeightsDtype, check_out_folder
from quietstar.cli.tables import table
from quietstar.config import ThoughtConfig
from quietstar.data.texts import DataConfig, load_data
from quietstar.recipes import fast
from quietstar.recipes.common.models import read


@dataclass
class Fast:
    """Train with shorter and shorter thoughts, then without any (Fast Quiet-STaR)."""

    data: DataConfig
    thoughts: ThoughtConfig
    recipe: fast.Config
    model: LanguageModel
    dtype: WeightsDtype = "float32"
    allow_bin: AllowBin = False
    resume: ResumeRun = ""

    def run(self) -> None:
        check_out_folder(self.recipe.out)
        model, tokenizer = read(self.model, self.dtype, self.allow_bin)
        data = load_data(self.data, tokenizer, max(J for _, J in fast.stages(self.recipe.curriculum)))
        if description := native.read_description(self.model):
            check_unseen(self.model, description[1], self.data, data, "leave these options as they were")
        _, report = fast.fast(
            model, data.train, data.held_out, self.thoughts, self.recipe, tokenizer, name=self.model, resume=bool(self.resume)
        )
        print(table(report["stages"], ("thought_tokens", "lookahead", "base", "mixed", "gain", "gain_low", "gain_high")))
        print("time of a generated token, as a multiple of that without thoughts (thought_tokens 0)")
        print(table(report["speeds"], ("thought_tokens", "times_plain")))
        losses = "{base:.4f} of the original model, {start:.4f} before and {plain:.4f} after the last step".format(**report)
        print(f"held-out loss without thoughts, nats a token: {losses}")
        if report["plain"] >= report["start"]:
            print("no update of the model without thoughts lowered its held-out loss, so it is saved as it was before")
        print(f"saved {Path(self.recipe.out) / fast.MODEL}")
