"""rotary: queries and keys of a decoder layer, normed and turned by their positions, forward and backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _dispatch
from ._operator import call, operator
from .checks import FLOATS, Checker
from .rms_norm import check_norm

_OP = "rotary"


def rotary(
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: tuple[int, int],
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary embedding (arXiv 2104.09864) of queries and keys, after an RMS norm of each head where there are weights.

    x becomes x * cos + turned(x) * sin, where turned puts the second half of a head, negated, before the first.

    Differentiable in qkv, k, v and both weights, in the ways that ``thought_attention`` is; it keeps cos and sin for that, and
    its inputs only where there are weights. Deterministic: two runs on one machine agree bitwise. Computed in fp32 (fp64 for
    fp64 inputs).

    Args:
        qkv: [B,n,(H+2G)*K], the n rows of queries, keys and values; or with k and v the queries [B,n,H*K]. fp32, fp16, bf16 or
            fp64.
        k: [B,n,G*K], same dtype.
        v: [B,n,G*K], same dtype.
        cos, sin: [B,n,K] or [1,n,K], of any of these dtypes, as are the weights; no gradient.
        heads: (H, G).
        q_weight, k_weight: [K].
        eps, offset: of the norms, as in ``rms_norm``.
        backend: "auto", or the name of one, which runs or raises.

    Returns:
        q [B,H,n,K], k [B,G,n,K] and v [B,G,n,K], each transposed from [B,n,heads,K]. v is a copy out of qkv, or a view of v.

    Raises:
        ValueError: an argument with the wrong shape, dtype, device or range, or a back end that can't run.
    """
    check = Checker(_OP)
    H, G, eps, offset = check_rotary(check, qkv, k, v, cos, sin, heads, q_weight, k_weight, eps, offset)
    backend = _dispatch.choose(_OP, backend, qkv.device, qkv.dtype, K=check["K"])
    q, turned, copy = call(_forward, qkv, k, cos, sin, H, G, q_weight, k_weight, eps, offset, backend)
    return q, turned, copy if v is None else v.unflatten(-1, (G, check["K"])).transpose(1, 2)


def check_rotary(
    check: Checker, qkv: Tensor, k: Tensor | None, v: Tensor | None, cos: Tensor, sin: Tensor, heads: Any,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float, offset: float,
) -> tuple[int, int, float, float]:  # fmt: skip
    """Returns H, G, eps and offset."""
    if not isinstance(heads, (tuple, list)) or len(heads) != 2:
        raise check.fail(f"heads must be (H, G), got {heads!r}")
    H, G = (check.integer(f"heads[{i}]", count, 1, 2**16) for i, count in enumerate(heads))
    check.tensor("cos", cos, "1,n,K" if isinstance(cos, Tensor) and cos.ndim and len(cos) == 1 else "B,n,K", FLOATS)
    check.tensor("sin", sin, "1,n,K" if len(cos) == 1 else "B,n,K", FLOATS, cos.device, "cos")
    K = check["K"]
    if K == 0:
        raise check.fail("cos must have heads of a width of at least 1, got K=0")
    if (k is None) != (v is None):
        raise check.fail("k and v must be given both or neither")
    check.sizes |= {"(H+2G)*K": (H + 2 * G) * K, "H*K": H * K, "G*K": G * K}
    check.tensor("qkv", qkv, "B,n,(H+2G)*K" if k is None else "B,n,H*K", FLOATS, cos.device, "cos")
    for name, value, letters, dtypes in (
        ("k", k, "B,n,G*K", (qkv.dtype,)),
        ("v", v, "B,n,G*K", (qkv.dtype,)),
        ("q_weight", q_weight, "K", FLOATS),
        ("k_weight", k_weight, "K", FLOATS),
    ):
        if value is not None:
            check.tensor(name, value, letters, dtypes, qkv.device, "qkv")
    return H, G, *check_norm(check, eps, offset)


def _rotary(
    qkv: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, H: int, G: int, q_weight: Tensor | None, k_weight: Tensor | None,
    eps: float, offset: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, and v, which is empty where k is given."""
    q, k, v = _dispatch.run(_OP, backend, qkv, k, cos, sin, H, G, q_weight, k_weight, eps, offset)
    return q, k, qkv.new_empty(0) if v is None else v


def _fake(qkv: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, H: int, G: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k_out, v = (qkv.new_empty((*qkv.shape[:2], heads, cos.shape[-1])).transpose(1, 2) for heads in (H, G, G))
    return q, k_out, v if k is None else qkv.new_empty(0)


def _rotary_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor | None, cos: Tensor, sin: Tensor, qkv: Tensor | None, k: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float, offset: float, needs_weights: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of qkv; of k, empty if there is a ``grad_v``: it is in the first then; of both weights, empty if not needed."""
    grads = _dispatch.run(
        f"{_OP}_backward", backend, grad_q, grad_k, grad_v, cos, sin, qkv, k, q_weight, k_weight, eps, offset, needs_weights
    )
    return tuple(grad_q.new_empty(0) if y is None else y for y in grads)  # type: ignore[return-value]


def _fake_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor | None, cos: Tensor, sin: Tensor, qkv: Tensor | None, k: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float, offset: float, needs_weights: bool, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, H, n, K = grad_q.shape
    G, merged = grad_k.shape[1], grad_v is not None
    dqkv, dk = grad_q.new_empty(B, n, (H + 2 * G if merged else H) * K), grad_q.new_empty(0 if merged else (B, n, G * K))
    return (
        dqkv,
        dk,
        *(grad_q.new_empty(0) if w is None or not needs_weights else w.new_empty(w.shape) for w in (q_weight, k_weight)),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkv, k, cos, sin, _, _, q_weight, k_weight, ctx.eps, ctx.offset, ctx.backend = inputs
    ctx.merged = k is None
    if not ctx.merged:
        ctx.mark_non_differentiable(output[2])
    x = (None, None) if q_weight is None and k_weight is None else (qkv, k)
    ctx.save_for_backward(cos, sin, *x, q_weight, k_weight)


def _autograd(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple:
    needs = ctx.needs_input_grad[6:8]
    dqkv, dk, *dweights = call(
        _backward,
        grad_q,
        grad_k,
        grad_v if ctx.merged else None,
        *ctx.saved_tensors,
        ctx.eps,
        ctx.offset,
        any(needs),
        ctx.backend,
    )
    dq_weight, dk_weight = (grad if need else None for grad, need in zip(dweights, needs, strict=True))
    return dqkv, None if ctx.merged else dk, *[None] * 4, dq_weight, dk_weight, None, None, None


_INSTEAD = "quietstar_kernels.testing.plain_rotary has all"
_backward = operator(_rotary_backward, _fake_backward, instead=_INSTEAD)
_forward = operator(_rotary, _fake, _setup_context, _autograd, instead=_INSTEAD)
