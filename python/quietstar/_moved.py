"""Old names fail with one line that gives the new one: of modules when they are imported, of attributes when they are read."""

import sys
from importlib.abc import MetaPathFinder
from typing import Any

from torch import nn

# A package, and what its modules were called below quietstar; old=new where a module's own name changed too.
TABLE = """
quietstar: reference=base_model recipes.commands=cli
quietstar.checkpoints: checkpoint=native official
quietstar.cli: options streams=thought_lines
quietstar.data: offline=thoughts thought_files=records
quietstar.evaluation: difficulty evaluate=losses harness=lm_eval intervals policies=anchor_choices scoring
quietstar.evaluation.questions: accuracy=asking accuracy_report=report answer_tokens answers continuations questions=reading
quietstar.explain: explain_page=page token_text
quietstar.hf: adapters attention cache graphs lm_head parts=modules verify
quietstar.memory: doctor=step scaling=processes
quietstar.recipes: recipes.compute_optimal=solve_compute_optimal recipes.icot=internalize recipes.icot_kd=internalize_kd
quietstar.recipes: recipes.icot_report=internalize_report recipes.icot_states=internalize_states recipes.plain=fast_plain
quietstar.recipes: recipes.budgets=solve_budgets recipes.test_time=solve recipes.verifier=vstar_verifier tasks
quietstar.recipes.common: recipes.evaluation=evaluation recipes.models=models recipes.plots=plots
quietstar.recipes.common: recipes.progress=progress recipes.rounds=rounds recipes.sampling=sampling recipes.selectors=selectors
quietstar.recipes.common: recipes.sft=sft recipes.telling=log
quietstar.run: batches optimizers runs=metrics sharding snapshots
"""
MOVED: dict[str, str] = {}
for package, _, row in (line.partition(": ") for line in TABLE.strip().splitlines()):
    for old, _, new in (entry.partition("=") for entry in row.split()):
        MOVED[f"quietstar.{old}"] = f"{package}.{new or old}"


class Moved(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname in MOVED:  # without name=, which ``from quietstar import x`` would take for "no such submodule"
            raise ModuleNotFoundError(f"{fullname} is now {MOVED[fullname]}")


class RenamedAttributes(nn.Module):
    RENAMED = {"reference": "base_model", "update_reference": "update_base_model"}

    def __getattr__(self, name: str) -> Any:
        if name in self.RENAMED:
            raise AttributeError(f"{type(self).__name__}.{name} is now {self.RENAMED[name]}")
        return super().__getattr__(name)


sys.meta_path.append(Moved())  # last, after the finders of modules that exist
