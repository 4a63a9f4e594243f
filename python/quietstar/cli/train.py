"""``quietstar train``"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, ClassVar

from accelerate.utils import set_seed
from tyro.conf import arg

from quietstar.checkpoints import native, places
from quietstar.checkpoints.contents import TrainedOn
from quietstar.checkpoints.pretrained import load_tokenizer
from quietstar.cli import common, errors
from quietstar.cli.ignored import DATA, LORA, THOUGHTS, Rule
from quietstar.cli.options import flat, read_config
from quietstar.cli.summary import finish
from quietstar.config import MAY_DIFFER, AdapterConfig, Dtype, ThoughtConfig, TrainConfig
from quietstar.data.held_out import describe
from quietstar.data.texts import DataConfig, load_data
from quietstar.data.thoughts import OfflineThoughts
from quietstar.evaluation.losses import evaluate
from quietstar.files.reading import sha256
from quietstar.files.writing import write_whole
from quietstar.memory.fit import Plan, too_large
from quietstar.memory.processes import gathered_dtype
from quietstar.memory.step import StepMemory, step_memory, thinking_places
from quietstar.model import QuietStar
from quietstar.run import trackers
from quietstar.run.lock import only_run_in
from quietstar.run.processes import Interrupted, process_state
from quietstar.run.resume import Settings, check_folder, check_inputs, tokens_hash
from quietstar.training import train

CONFIG = "config.json"


@dataclass
class Train:
    """Train a model to think before every token."""

    model: Annotated[str, arg(help="hub name, folder or GGUF file of a causal language model, or a model that thinks already")]
    data: DataConfig
    thoughts: ThoughtConfig
    train: TrainConfig
    lora: AdapterConfig
    dtype: Annotated[Dtype, arg(help="dtype of the weights")] = "float32"
    compile: Annotated[bool, arg(help="compile the decoder with torch.compile, which takes minutes at first")] = field(
        default=False, metadata=MAY_DIFFER
    )
    gradient_checkpointing: Annotated[bool, arg(help="recompute activations in the backward pass, to save memory")] = field(
        default=False, metadata=MAY_DIFFER
    )
    allow_bin: common.AllowBin = field(default=False, metadata=MAY_DIFFER)
    controls: common.Controls = field(default=True, metadata=MAY_DIFFER)
    check_memory: Annotated[bool, arg(help="refuse a step that needs more memory than is free, by doctor's estimate")] = field(
        default=True, metadata=MAY_DIFFER
    )
    thoughts_from: Annotated[str, arg(help="a .jsonl or .parquet file of thoughts about these texts; default sampled")] = ""
    config: Annotated[str, arg(help=f"JSON or YAML file of options, such as a run's {CONFIG}; typed options win")] = field(
        default="", metadata=MAY_DIFFER
    )
    resume: Annotated[str, arg(help="auto: continue from the newest whole checkpoint in --out; or a path")] = field(
        default="", metadata=MAY_DIFFER
    )

    inherits: ClassVar[tuple] = (DataConfig, ThoughtConfig)
    ignored: ClassVar[list] = [
        *DATA,
        *THOUGHTS,
        *LORA,
        Rule("eval_every controls", lambda o: o.held_out < 2, "unless --held-out is 2 or more"),
        Rule("controls", lambda o: not o.eval_every, "with --eval-every=0"),
    ]

    def run(self) -> None:
        common.check_out_folder(self.train.out)
        with only_run_in(self.train.out):
            self._run()

    def _run(self) -> None:
        trackers.check(self.train)
        check_folder(self.train.out, "checkpoints", bool(places.every(self.train.out)), bool(self.resume))
        set_seed(self.train.seed)  # the mixing head's first weights are random
        tokenizer = load_tokenizer(self.model)
        data = load_data(self.data, tokenizer, self.thoughts.lookahead)
        qs = common.load_model(self.model, self.thoughts, tokenizer, self.dtype, self.allow_bin)
        common.check_unseen(self.model, qs.trained_on, self.data, data, "leave these options as they were, or add --held-out=0")
        inputs = {f"the tokenizer of {self.model}": tokens_hash(data.train)}
        if os.path.isfile(self.thoughts_from):
            inputs[self.thoughts_from] = sha256(self.thoughts_from)
        qs.trained_on = (*qs.trained_on, replace(describe(self.data, data, self.model), inputs=inputs))
        if self.lora.lora_rank:
            qs.add_adapters(self.lora)
        if self.gradient_checkpointing:
            qs.gradient_checkpointing_enable()
        if self.compile:
            qs.compile()
        examples = OfflineThoughts(self.thoughts_from, data.train, qs) if self.thoughts_from else data.train
        evaluation = None
        if len(data.held_out) >= 2:
            size = max(1, self.train.batch_size // self.train.accumulation)
            evaluation = partial(evaluate, examples=data.held_out, batch_size=size, controls=self.controls)
        self._check_same_run(qs.trained_on)
        if self.check_memory and process_state().is_main_process:
            self._check_memory(qs, max(len(x["input_ids"]) for x in data.train))
        try:
            if process_state().is_main_process:
                print(f"{len(data.train):,} examples to train on, {common.held_out_text(data)}, to {self.train.out}")
                if not places.every(self.train.out):
                    Path(self.train.out).mkdir(parents=True, exist_ok=True)
                    options = {name: value for name, value in flat(self).items() if name not in ("config", "resume")}
                    write_whole(Path(self.train.out) / CONFIG, json.dumps(options, indent=2) + "\n")
                else:
                    self._keep_steps(Path(self.train.out) / CONFIG)
            metrics = train(qs, examples, self.train, evaluate=evaluation, resume=self.resume or None, evaluate_first=True)
        except Interrupted as stop:
            process_state().destroy_process_group()
            again = f"quietstar train {common.typed('config', str(Path(self.train.out) / CONFIG))} --resume"
            saved = f"saved {stop.checkpoint}" if stop.checkpoint else "nothing was trained yet"
            text = f"stopped by a signal; {saved}; continue with: {again}"
            raise errors.Failure(errors.SAVED, text) from stop
        except (OSError, FloatingPointError, MemoryError, RuntimeError) as error:
            reason = errors.runtime_failure(error)
            if reason is None or isinstance(error, BrokenPipeError):
                raise
            path = places.newest_whole(places.every(self.train.out))
            kept = f"the last whole checkpoint is {path}" if path else "no checkpoint was written yet"
            raise errors.Failure(errors.RUNTIME, f"{reason}; {kept}") from error
        if process_state().is_main_process:
            print(finish(self.train.out, metrics, held_out=evaluation is not None))
        process_state().destroy_process_group()

    def _keep_steps(self, path: Path) -> None:
        """A run that goes on for another number of steps does so too when it is continued from its options."""
        options = read_config(path) if path.exists() else {}
        last = places.step_of(places.every(self.train.out)[-1])
        if options.get("steps") != self.train.steps >= last and options.get("schedule") == self.train.schedule == "constant":
            write_whole(path, json.dumps(options | {"steps": self.train.steps}, indent=2) + "\n")

    def _check_memory(self, qs: QuietStar, length: int) -> None:
        """Refuse a step that doesn't fit, since the system would kill it, or swap for hours."""
        machine = common.this_machine(process_state().num_processes)
        shares = 1 if self.train.sharding == "no" else machine.processes
        trained = sum(x.nbytes for x in qs.parameters() if x.requires_grad) // shares
        parts = {
            "weights": 0 if machine.device.type == "cpu" else sum(x.nbytes for x in qs.parameters()) // shares,  # loaded here
            "gradients": trained,
            "moments": trained // 2 if self.train.optimizer == "8bit" else 2 * trained,
        }
        dtype = gathered_dtype(qs.model.dtype, self.train.precision)
        whole = dtype.itemsize * sum(x.numel() for x in qs.model.parameters())
        gathered = whole if self.train.rollout_weights == "gathered" else 0

        @cache
        def estimate(texts: int, anchor_chunk: int | None) -> StepMemory:
            thinking, adapters = thinking_places(self.thoughts, length), self.lora.lora_rank > 0
            memory = step_memory(
                qs.model.config, self.thoughts, texts, length, dtype, anchor_chunk, places=thinking, adapters=adapters
            )
            return replace(memory, rollout=memory.rollout + gathered, **parts)

        each = -(-self.train.batch_size // machine.processes)
        # Sentences may be few, as may thoughts of a file, so that this is the least that they need.
        few = self.thoughts.anchors == "sentences" or self.thoughts_from
        chunk = 1 if few or self.train.anchor_chunk == "auto" else self.train.anchor_chunk
        plan = Plan(-(-each // self.train.accumulation), self.gradient_checkpointing, chunk)
        try:
            reason = too_large(plan, length, estimate, machine, each)
        except ValueError as error:
            print(f"warning: {error}", file=sys.stderr)
            return
        if reason:
            raise errors.Failure(errors.RUNTIME, f"{reason}; --no-check-memory tries it all the same")

    def _check_same_run(self, trained_on: Sequence[TrainedOn]) -> None:
        """Model, data and thoughts as the run began with; ``train`` checks the rest."""
        run = Path(self.train.out) if self.resume == "auto" else Path(self.resume).parent.parent
        if not self.resume or not places.every(run) or not (run / CONFIG).exists():
            return
        Settings.of(self, self.data, self.lora).check(run, read_config(run / CONFIG))
        before: Sequence[TrainedOn] = ()
        for path in reversed(places.every(run)):
            with suppress(ValueError):  # a damaged one is passed over when the run continues, too
                before = (native.read_description(path) or (None, ()))[1][-1:]
                break
        for one in before:
            saved, now = ({self.data.data: x.sha256} | x.inputs for x in (one, trained_on[-1]))
            check_inputs(run, saved, now)
