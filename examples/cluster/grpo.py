"""GRPO on shared prompts with sharded weights and vLLM, which stops at a signal and goes on later. To be copied and changed.

On machines under SLURM: ``grpo.sh`` beside this file. On one machine of 8 GPUs, where vLLM shares them with the training:

    accelerate launch --config_file examples/cluster/fsdp2.yaml examples/cluster/grpo.py --model_name_or_path M --data D.jsonl \
        --output_dir runs/grpo --use_vllm

Options are those of TRL's GRPOConfig and ModelConfig; ``--use_peft`` trains adapters. D.jsonl has a prompt and its answer in
each line: {"prompt": "What is 6 * 7?", "answer": "42"}.
"""

import os
import re
import signal
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from torch import distributed
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config

from quietstar import SharedPrompts

SAVED = 75  # the exit code of a run that stopped and can go on


@dataclass
class Data:
    data: str = field(metadata={"help": "a .jsonl file with a prompt and its answer in each line"})


class SharedGRPOTrainer(SharedPrompts, GRPOTrainer):
    pass


def right(completions, answer, **_):
    """The reward: 1 where the last number of a completion is the answer."""
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    numbers = [re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", "")) for text in texts]
    return [float(found[-1:] == [str(wanted)]) for found, wanted in zip(numbers, answer, strict=True)]


class SaveAtSignal(TrainerCallback):
    """After SIGUSR1 (Slurm, before the time limit) or SIGTERM to any process, all save at the end of the step and stop."""

    def __init__(self):
        self.came = self.stopped = False
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self.catch)

    def catch(self, *_):
        self.came = True

    def on_step_end(self, args, state, control, **_):
        came = torch.tensor(float(self.came), device=args.device)
        if distributed.is_initialized():  # they must stop after the same step
            distributed.all_reduce(came, distributed.ReduceOp.MAX)
        if came and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


def newest_checkpoint(folder):
    """The last one that was saved to its end, if there is one."""
    whole = [file.parent for file in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def name_run(args):
    """The name and id with which trackers know a run are kept in its folder, for when it goes on."""
    file = Path(args.output_dir) / "tracker-id"
    if args.process_index == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        number = file.read_text(encoding="utf-8")
        args.run_name = args.run_name or f"{file.parent.resolve().name}-{number}"  # trackio goes on by name
        for name, value in {"PROJECT": args.project, "RUN_ID": number, "RESUME": "allow"}.items():
            os.environ.setdefault(f"WANDB_{name}", value)


def main():
    parser = TrlParser((Data, GRPOConfig, ModelConfig))
    # With a constant rate a run may go on with a larger --max_steps.
    parser.set_defaults(lr_scheduler_type="constant_with_warmup", save_steps=50, save_total_limit=2, project="quietstar")
    data, args, model = parser.parse_args_and_config()
    stop = SaveAtSignal()
    name_run(args)
    trainer = SharedGRPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=right,
        args=args,
        train_dataset=load_dataset("json", data_files=data.data, split="train"),
        peft_config=get_peft_config(model),
        callbacks=[stop],
    )
    trainer.train(resume_from_checkpoint=newest_checkpoint(args.output_dir))
    if not stop.stopped:
        if trainer.is_fsdp_enabled:  # checkpoints may be sharded, but the result is one folder for from_pretrained and vLLM
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model()
    trainer.end()
    sys.exit(SAVED if stop.stopped else 0)


if __name__ == "__main__":
    main()
