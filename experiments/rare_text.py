"""Digit sums whose answer comes late: it follows a copy of the line's first two digits, which needs no thought.

4 1 9 3 5 = 4 1 2                  the answer alone, 40 % of the lines
4 1 9 3 5 = - 5 4 7 2 - 4 1 2      an aside of running sums, which helps, is rare
4 1 9 3 5 = - 4 1 9 3 - 4 1 2      an aside that repeats the digits, which doesn't, is common
"""

from __future__ import annotations

import torch
from digit_thoughts import digit_sums
from torch import Tensor
from transformers import LlamaForCausalLM

from quietstar import QuietStar
from quietstar.config import TrainConfig
from quietstar.run.batches import Example, mix_seed
from quietstar.training import Loss

COPIED = 2  # digits before the answer
LOOKAHEAD = COPIED + 1  # tokens from "=" to the answer
ANCHOR = digit_sums.AT_EQUALS
LONGER = 4  # extra rounds of pretraining at most, while a model has not learnt the steps


def with_copy(lines: Tensor) -> Tensor:
    """Lines of digit_sums, with the copy inserted before their last two tokens, the answer and a newline."""
    return torch.cat([lines[:, :-2], lines[:, :COPIED], lines[:, -2:]], 1)


def direct_lines(digits: Tensor) -> Tensor:
    """d d d d d = d d a and a newline, [lines,10]."""
    return with_copy(digit_sums.direct_lines(digits))


def aside_lines(digits: Tensor, aside: Tensor) -> Tensor:
    """d d d d d = - c c c c - d d a and a newline, [lines,16]."""
    return with_copy(digit_sums.aside_lines(digits, aside))


def helpful_lines(digits: Tensor) -> Tensor:
    return aside_lines(digits, digit_sums.running_sums(digits))


def mixed_lines(digits: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """The text to pretrain on, [lines,16]; this share of its asides is helpful. Lines are padded as in digit_sums."""
    kind, luck = torch.rand(2, len(digits), 1, generator=generator)
    with_aside = torch.where(luck < share, helpful_lines(digits), aside_lines(digits, digits[:, : digit_sums.STEPS]))
    direct = direct_lines(digits)
    fill = digit_sums.column(digits, digit_sums.PAUSE).expand(-1, with_aside.shape[1] - direct.shape[1])
    return torch.where(kind < digit_sums.DIRECT, torch.cat([direct, fill], 1), with_aside)


def examples(digits: Tensor) -> list[Example]:
    """Lines without an aside, for the training loop; only "=" has a thought."""
    return [{"input_ids": line, "anchors": torch.tensor([ANCHOR])} for line in direct_lines(digits)]


def read(model: LlamaForCausalLM, strings: Tensor, share: float, steps: int, peak: float, seed: int, asides: int = 0) -> None:
    """Plain training on 128 lines of the text per step; with ``asides``, half are helpful lines, drawn from only that many."""
    generator = torch.Generator().manual_seed(mix_seed(seed, steps))
    few = digit_sums.draw(strings, asides, generator)

    def lines(_: int) -> Tensor:
        text = mixed_lines(digit_sums.draw(strings, 64 if asides else 128, generator), share, generator)
        return torch.cat([text, helpful_lines(digit_sums.draw(few, 64, generator))]) if asides else text

    config = TrainConfig(learning_rate=peak, steps=steps, schedule="cosine")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    digit_sums.train_lm(model, lines, optimizer, config.rate, steps)


def learnt(strings: Tensor, digits: Tensor, seed: int, steps: int, longer: int) -> LlamaForCausalLM:
    """A model that knows the steps: read with ``HELPFUL`` asides, and as often ``longer`` steps more as that needs."""
    model = digit_sums.new_model(seed)
    read(model, strings, digit_sums.HELPFUL, steps, 3e-3, seed)
    for shift in range(1, LONGER + 1):
        if knowledge(model, digits, seed)["steps_known"] >= digit_sums.RIGHT_STEPS:
            break
        read(model, strings, digit_sums.HELPFUL, longer, 1e-3, seed + shift)
    return model


def read_direct(model: LlamaForCausalLM, strings: Tensor, steps: int, seed: int) -> None:
    """Plain training on 256 lines without an aside per step, as many as in training with thoughts."""
    generator = torch.Generator().manual_seed(seed)
    config = TrainConfig(learning_rate=1e-3, steps=steps)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    digit_sums.train_lm(model, lambda _: direct_lines(digit_sums.draw(strings, 256, generator)), optimizer, config.rate, steps)


def with_rehearsal(strings: Tensor, share: float) -> Loss:
    return digit_sums.with_rehearsal(strings, lambda digits, generator: mixed_lines(digits, share, generator))


@torch.no_grad()
def knowledge(model: LlamaForCausalLM, digits: Tensor, seed: int) -> dict[str, float]:
    """What a model knows before it thinks: the lowest probability of a right step after right ones, the probability of the
    answer after all of them, and the share of right thoughts among those sampled from it.

    The first step does not count, because there the text can continue with either kind of aside.
    """
    lines = helpful_lines(digits)
    probability = model.eval()(lines).logits[:, :-1].softmax(-1).gather(2, lines[:, 1:, None])[..., 0].mean(0)
    steps = probability[ANCHOR + 2 : ANCHOR + 1 + digit_sums.STEPS]  # at the first three steps, each of which predicts the next
    qs = digit_sums.think_with(model, digit_sums.EQUALS_ONLY, seed)
    right = digit_sums.right_thoughts(digit_sums.own_thoughts(qs, digits, seed=seed), digits)
    return {"steps_known": float(steps.min()), "answer_known": float(probability[-2]), "right_before": right}


def score(logprobs: Tensor, digits: Tensor) -> dict[str, float]:
    """Of log-probabilities [lines,1,V]: the share of lines whose most likely token is the answer, and the loss in nats."""
    found = digit_sums.score(logprobs, digits)
    return {"accuracy": found["right"] / found["lines"], "loss": found["nll"]}


def answers(qs: QuietStar, digits: Tensor, thought_ids: Tensor) -> dict[str, float]:
    """``score`` of the mixed prediction of the answer, and the mixing weight."""
    found = digit_sums.predict_lines(qs, direct_lines(digits), thought_ids, (ANCHOR,), LOOKAHEAD)
    return {**score(found.mixed, digits), "mixing_weight": float(found.weight.mean())}


@torch.no_grad()
def plain_answers(model: LlamaForCausalLM, digits: Tensor) -> dict[str, float]:
    """``score`` of a model without thoughts."""
    return score(model.eval()(direct_lines(digits)).logits[:, ANCHOR + COPIED, None].log_softmax(-1), digits)
