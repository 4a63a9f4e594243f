"""Until the ops are there."""

import torch


def _walk(text, lo):
    k, w, g = text
    k = k.to(w.dtype).repeat_interleave(w.shape[1] // k.shape[1], 1)
    g = g if g.ndim == 4 else g[..., None]
    S = w.new_zeros(*w.shape[:2], k.shape[-1], w.shape[-1])
    out = []
    for t in range(w.shape[2]):
        S = S * (lo[:, t] != t)[:, None, None, None] * g[:, :, t].exp()[..., None] + k[:, :, t, :, None] * w[:, :, t, None, :]
        out.append(S)
    return torch.stack(out, 2)  # B,H,L,K,E


def text_states(text, lo):
    return _walk(text, lo)


def advance_states(text, states, lo, place):
    states.copy_(_walk(text, lo))


def anchor_states(text, states, layout):
    a = layout.branches.table[..., 0].long().clamp(min=0)
    return states.gather(2, a[:, None, :, None, None].expand(-1, states.shape[1], -1, *states.shape[3:]))


def thought_delta_decode(q, k, v, g, beta, text, states, own, layout, step):
    if isinstance(own, torch.Tensor):
        S = own
    else:
        S = anchor_states(text, states, layout)
        for s in range(int(step)):
            kk = own.k[:, :, :, s].to(S.dtype).repeat_interleave(v.shape[1] // k.shape[1], 1)
            gg = own.g[:, :, :, s]
            gg = gg if gg.ndim == 4 else gg[..., None]
            S = S * gg.exp()[..., None] + kk[..., None] * own.w[:, :, :, s][..., None, :]
    n = v.shape[1] // k.shape[1]
    q, k = (x.to(S.dtype).repeat_interleave(n, 1) for x in (q, k))
    g = g if g.ndim == 4 else g[..., None]
    S2 = S * g.to(S.dtype).exp()[..., None]
    w = v.to(S.dtype)
    if beta is not None:
        w = beta.to(S.dtype)[..., None] * (w - (k[..., None] * S2).sum(-2))
    S2 = S2 + k[..., None] * w[..., None, :]
    if isinstance(own, torch.Tensor):
        own.copy_(S2)
    return (q[..., None] * S2).sum(-2).to(v.dtype), w
