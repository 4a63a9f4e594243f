"""``quietstar fast``"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from quietstar import ThoughtConfig
from quietstar.checkpoints import native
from quietstar.cli.common import AllowBin, WeightsDtype, check_out_folder, check_unseen, table
from quietstar.cli.ignored import DATA, THOUGHTS, Rule
from quietstar.data.texts import DataConfig, load_data
from quietstar_recipes.common.command import EXPERIMENTAL, LanguageModel, ResumeRun
from quietstar_recipes.common.models import read
from quietstar_recipes.fast.run import MODEL, Config, fast, stages


@dataclass
class Fast:
    """Train with shorter and shorter thoughts, then without any (Fast Quiet-STaR)."""

    data: DataConfig
    thoughts: ThoughtConfig
    recipe: Annotated[Config, EXPERIMENTAL]
    model: LanguageModel
    dtype: WeightsDtype = "float32"
    allow_bin: AllowBin = False
    resume: ResumeRun = ""

    inherits: ClassVar[tuple] = (DataConfig,)
    ignored: ClassVar[list] = [
        *DATA,
        *THOUGHTS,
        Rule("thought_tokens lookahead", lambda o: True, "here: --curriculum sets it"),
        Rule("later_rate", lambda o: "," not in o.curriculum, "with a curriculum of one stage"),
        Rule(
            "plain_weight plain_temperature clamp_reward",
            lambda o: o.objective not in ("sampled", "observed"),
            "unless --objective is sampled or observed",
        ),
    ]

    def run(self) -> None:
        check_out_folder(self.recipe.out)
        model, tokenizer = read(self.model, self.dtype, self.allow_bin)
        data = load_data(self.data, tokenizer, max(J for _, J in stages(self.recipe.curriculum)))
        if description := native.read_description(self.model):
            check_unseen(self.model, description[1], self.data, data, "leave these options as they were")
        _, report = fast(
            model, data.train, data.held_out, self.thoughts, self.recipe, tokenizer, name=self.model, resume=bool(self.resume)
        )
        print(table(report["stages"], ("thought_tokens", "lookahead", "base", "mixed", "gain", "gain_low", "gain_high")))
        print("time of a generated token, as a multiple of that without thoughts (thought_tokens 0)")
        print(table(report["speeds"], ("thought_tokens", "times_plain")))
        losses = "{base:.4f} of the original model, {start:.4f} before and {plain:.4f} after the last step".format(**report)
        print(f"held-out loss without thoughts, nats per token: {losses}")
        if report["plain"] >= report["start"]:
            print("no update of the model without thoughts lowered its held-out loss, so it is saved as it was before")
        print(f"saved {Path(self.recipe.out) / MODEL}")
