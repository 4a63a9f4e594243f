"""How likely the known answer is after a completion, as a reward in TRL's trainers. It needs no verifier.

Rewards are functions of the answer's log-probabilities, from a pass without gradients that computes shared tokens once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quietstar.hf.modules import dropout_off, unwrapped
from quietstar.hf.positions import check_room, position_limits
from quietstar_kernels.checks import choice, refusal, unicode

FORMS = ("logprob", "verifree", "rlpr", "nover")


class LikelihoodReward:
    """A reward function for a trainer with ``SharedPrompts``, such as ``LikelihoodReward("logprob", "answer", "</think>")``.

    The policy, without dropout, reads a prompt, its completion as a thought, ``joint`` and the answer of the data set. A
    completion ends before its first ``joint``, since an answer of its own follows, and before a last end-of-text token. Only
    tokens of the answer are scored, at temperature 1. With p their probabilities, the forms are:

    - "logprob": the mean of log p, in nats (arXiv 2602.03979, where the log-probability alone worked in every setup).
    - "verifree": the product of p (VeriFree, arXiv 2505.21493), which is close to 0 for long answers.
    - "rlpr": the mean of p less what it is without the completion, clipped to [0,1] (RLPR, arXiv 2506.18254). Its filter of
      prompts by the standard deviation of rewards is not here.
    - "nover": the rank of the answer's perplexity among the G completions of a prompt, from 1 for the lowest to 1/G for the
      highest; equal ones get the same (NOVER, arXiv 2505.16022). The mean of -log p, whose exponential it is, is divided by
      1 + log10 of the completion's tokens, as in the published code. Its rewards of tags and efficiency are not here.

    Logs call it ``answer_logprob`` and so on. The advantage is the trainer's: RLOO's is the reward less the mean of the others.

    Args:
        form: one of these names.
        column: of the data set, with texts of at least one token. TRL hands on all but "prompt", "completion" and
            "completion_ids".
        joint: text between completion and answer, such as "</think>" or " The answer is". It may be empty. Joint and answer
            are tokenised each for itself, without special tokens: a space belongs where the tokenizer has it inside a token.

    Raises:
        ValueError: another form, a column that is not there or holds something else, more positions than the model has, or a
            trainer without ``SharedPrompts``.
    """

    trainer: Any = None  # SharedPrompts sets it

    def __init__(self, form: str, column: str, joint: str):
        self.form = choice("LikelihoodReward: form", form, FORMS)
        self.column = unicode("LikelihoodReward: column", column)
        self.joint = unicode("LikelihoodReward: joint", joint)
        self.__name__ = f"answer_{form}"

    @torch.no_grad()
    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        """TRL's call. Returns a reward for each completion."""
        trainer = self.trainer
        if trainer is None:
            raise ValueError("LikelihoodReward: reward_funcs must be those of a trainer with SharedPrompts before TRL's")
        answers, joint = self._answers(columns.get(self.column)), self._tokens([self.joint])[0]
        thoughts = [self._thought(list(ids), joint) for ids in completion_ids]
        training = trainer.model.training
        size = trainer.args.per_device_train_batch_size if training else trainer.args.per_device_eval_batch_size
        rows = list(zip(trainer.prompt_ids, thoughts, answers, strict=True))
        with dropout_off(trainer.model):
            scores = torch.cat([self._scores(rows[i : i + size], joint) for i in range(0, len(rows), size)])
        if self.form == "nover":  # TRL spreads a group over processes
            everywhere = trainer.accelerator.gather(scores)
            group = trainer.num_generations if training else trainer.num_generations_eval
            first = trainer.accelerator.process_index * len(rows)
            scores = ranks(everywhere.view(-1, group)).flatten()[first : first + len(rows)]
        return scores.tolist()

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return self.trainer.processing_class(texts, add_special_tokens=False)["input_ids"]

    def _answers(self, texts: Any) -> list[list[int]]:
        if texts is None:
            raise refusal("LikelihoodReward: column", "one of the data set that TRL hands on", self.column)
        what = f"LikelihoodReward: column {self.column!r} must hold"
        found = self._tokens([unicode(f"{what} texts, each", text) for text in texts])
        if [] in found:
            raise ValueError(f"{what} texts of at least one token, got {texts[found.index([])]!r}")
        return found

    def _thought(self, ids: list[int], joint: list[int]) -> list[int]:
        if joint:
            ids = next((ids[:i] for i in range(len(ids)) if ids[i : i + len(joint)] == joint), ids)
        return ids[:-1] if ids and ids[-1] in self.trainer.eos_token_ids else ids

    def _scores(self, rows: list[tuple[list[int], list[int], list[int]]], joint: list[int]) -> Tensor:
        """Rewards [B] of a microbatch of prompts, thoughts and answers; for "nover", logarithms of perplexities."""
        trainer = self.trainer
        if self.form == "rlpr":
            rows = rows + [(prompt, [], answer) for prompt, _, answer in rows]
        sequences = [torch.tensor([*prompt, *thought, *joint, *answer]) for prompt, thought, answer in rows]
        model = unwrapped(trainer.accelerator.unwrap_model(trainer.model))
        longest = max(map(len, sequences))
        check_room(type(model).__name__, position_limits(model), longest, "LikelihoodReward: prompt, completion and answer")
        counts = torch.tensor([len(answer) for _, _, answer in rows])
        live = torch.arange(int(counts.max())) < counts[:, None]
        logprob, _ = trainer.end_logprobs(trainer.model, sequences, live)
        counts, live = counts.to(logprob.device), live.to(logprob.device)
        if self.form == "verifree":
            return logprob.sum(1).exp()
        if self.form == "rlpr":
            after, alone = ((logprob.exp() * live).sum(1) / counts).chunk(2)
            return (after - alone).clamp(0, 1)
        mean = logprob.sum(1) / counts
        if self.form == "logprob":
            return mean
        lengths = mean.new_tensor([len(thought) for _, thought, _ in rows])
        return -mean / (1 + lengths.clamp(min=1).log10())


def ranks(values: Tensor) -> Tensor:
    """For each of values [B,G], the share of its row that is not below it: 1 for the lowest, 1/G for the highest."""
    return (values[:, None] >= values[:, :, None]).to(values.dtype).mean(2)
