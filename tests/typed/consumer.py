"""What a user's program may rely on, for a type checker: ``tests/test_typing.py`` checks it, and nothing runs it."""

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import assert_type

from quietstar import (
    DataConfig,
    QuietStar,
    QuietStarOutput,
    ThoughtConfig,
    Thoughts,
    TokenLosses,
    TrainConfig,
    load_data,
    register_tree_attention,
    shared_logprobs,
    summary,
    token_losses,
    train,
    verify,
)
from quietstar_kernels import (
    DeltaRows,
    ThoughtLayout,
    advance_states,
    anchor_states,
    backends,
    conv_tails,
    gated_activation,
    gather_text,
    linear_divergence,
    linear_logprob,
    rms_norm,
    rotary,
    rotary_decode,
    sample_thoughts,
    sample_token,
    text_attention,
    text_states,
    thought_attention,
    thought_conv,
    thought_conv_decode,
    thought_decode,
    thought_delta,
    thought_delta_decode,
    vocab_parallel_logprob,
)


def kernels(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, flag: bool) -> Tensor:
    layout = ThoughtLayout.every_position(batch=2, text_length=8, thoughts=2, rows=6)
    assert_type(layout.M, int)
    out: Tensor = thought_attention(q, k, v, layout)
    out, lse = thought_attention(q, k, v, layout, return_lse=True)
    out = thought_attention(q, k, v, layout, window=4, return_lse=False, backend="reference")
    either: Tensor | tuple[Tensor, Tensor] = thought_attention(q, k, v, layout, return_lse=flag)
    out = thought_decode(q, k, v, k, v, layout, step=0)
    total, out = rms_norm(hidden, weight, delta=hidden, dtype=lse.dtype)
    q, k, v = rotary(total, None, None, hidden, hidden, (4, 2), q_weight=weight)
    q = rotary_decode(q, k, v, hidden, hidden, (4, 2), k, v, step=0)
    out = gated_activation(out, hidden, "gelu_tanh")
    out = thought_conv(hidden, weight, None, layout)
    out = thought_conv_decode(hidden, conv_tails(hidden, layout, 4), weight, None)
    out, w = thought_delta(q, k, v, lse, None, layout)
    rows = DeltaRows(k, w, lse)
    states: Tensor = text_states(rows, layout.lo)
    out, w = thought_delta_decode(q, k, v, lse, None, rows, states, anchor_states(rows, states, layout), layout, step=0)
    advance_states(rows, states, layout.lo, targets)
    logprob: Tensor = linear_logprob(hidden, weight, targets)
    logprob, entropy = linear_logprob(hidden, weight, targets, return_entropy=True)
    either = linear_logprob(hidden, weight, targets, return_entropy=flag)
    logprob, entropy = vocab_parallel_logprob(hidden, weight, targets, first_id=0, return_entropy=True)
    out = text_attention(q, gather_text(k, [[(0, 8)]]), gather_text(v, [[(0, 8)]]), [(0, 8)], window=4)
    logprob = linear_divergence(hidden, weight, hidden, weight, beta=0.5)
    ids, logprob = sample_token(hidden, weight, targets, seed=0)
    ids, logprob = sample_thoughts(lambda ids, layout: hidden, weight, layout, ids, thought_tokens=4, start_id=1, seed=0)
    assert_type([row["status"] for row in backends("cpu")], list[str])
    assert_type(either, Tensor | tuple[Tensor, Tensor])
    return out.sum() + lse.sum() + entropy.sum() + logprob.mean()


def wrapper(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Tensor, folder: Path) -> float:
    assert_type(verify(model).ok, bool)
    qs = QuietStar(model, ThoughtConfig(thoughts=2, thought_tokens=4), tokenizer)
    result: QuietStarOutput = qs(texts)
    assert_type(qs.forward(texts), QuietStarOutput)
    assert_type(qs.think(texts), Thoughts)
    data = load_data(DataConfig(data=str(folder)), tokenizer, lookahead=4)
    train(qs, data.train, TrainConfig(steps=2, out=str(folder)))
    losses = token_losses(qs, data.held_out)
    assert_type(losses, TokenLosses)
    assert_type(summary(losses), dict[str, float])
    assert_type(shared_logprobs(model, [[1, 2], [1, 3]]), list[Tensor])
    assert_type(register_tree_attention(), str)
    qs.save_pretrained(folder)
    assert_type(QuietStar.from_pretrained(folder), QuietStar)
    assert result.loss is not None
    return float(result.loss)
