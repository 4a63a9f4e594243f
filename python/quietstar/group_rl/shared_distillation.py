"""On-policy distillation in TRL's trainer, in which student and teacher run once what prompts and completions begin with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from quietstar.group_rl.completions import EndTokens, without_padding
from quietstar.group_rl.shared_logprobs import model_and_head
from quietstar.group_rl.shared_prompt import SharedPrompts
from quietstar.hf.architectures import check_model
from quietstar.hf.attention import WRAPPED_NAME
from quietstar.hf.modules import unwrapped
from quietstar.hf.positions import check_room, rotary_limits


class SharedDistillation(SharedPrompts):
    """Put it before ``trl.DistillationTrainer``: ``class Trainer(SharedDistillation, DistillationTrainer): pass``.

    What ``SharedPrompts`` says holds here too, and of the teacher as of the student. TRL's loss compares their heads in chunks.
    It samples one completion for each row of the data: rows with the same prompt share it if they follow one another and
    ``shuffle_dataset=False``, and all rows share a system prompt.

    Tested with TRL 1.16.

    Raises:
        ValueError: as ``SharedPrompts``, DeepSpeed, or no teacher in this process, such as with one on a server.
    """

    _hook, _parameters = "_get_last_hidden_state", ["self", "unwrapped_model", "input_ids", "attention_mask", "logits_to_keep"]
    _trainers = "DistillationTrainer"
    # What SharedPrompts looks for in trainers that have rewards.
    ref_model, aux_loss_enabled, reward_funcs = None, False, []

    teacher_model: Any  # of TRL's trainer

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.teacher_model is None:
            raise ValueError(f"{type(self).__name__}: teacher_model must be a model of this process, got None")
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        check_model(teacher)
        teacher.set_attn_implementation(WRAPPED_NAME)
        model_and_head(f"{type(self).__name__}: teacher_model", self.teacher_model)

    def _check_options(self) -> None:
        super()._check_options()
        if self.is_deepspeed_enabled:  # TRL then divides the teacher's weights too
            raise ValueError(
                f"{type(self).__name__}: DeepSpeed can't run here: shard weights with FSDP2, or leave out deepspeed"
            )

    def _get_last_hidden_state(
        self, unwrapped_model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **inputs: Any
    ) -> Tensor:
        """TRL's method: the last hidden states [B,T,D] that predict completions of T = ``logits_to_keep`` tokens."""
        if inputs:
            raise ValueError(f"{type(self).__name__}: prompts must be text alone, got {', '.join(inputs)}")
        inner = unwrapped(unwrapped_model)
        limits, row = rotary_limits(inner.config), input_ids.shape[1]
        check_room(type(inner).__name__, limits, row, "prompts and completions, padded as by TRL,")
        sequences, live = without_padding(input_ids, attention_mask, logits_to_keep)
        tokens = EndTokens.of(sequences, live)
        return tokens.spread(tokens.hidden(inner))
