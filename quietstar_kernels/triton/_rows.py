"""What each packed row sees, in the kernels: the predicate of ``ThoughtLayout`` for one batch row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def seen_by(m, inside, anchor, lo, length, L, N, S, window):
    """Packed rows ``m``, int32 [BLOCK], where ``inside``: (first, last, own_first, on).

    A row that is on sees text positions first..last and the packed rows own_first..m of its own thought; either range may
    be empty. anchor [P], lo [L] and length [P*N] point into one batch row; ``window`` is W, or 2^30 for none.
    """
    is_text = m < L
    r = tl.maximum(m - L, 0)
    s = r % S
    thought = r // S
    in_thought = inside & (m >= L)
    place = tl.load(anchor + thought // N, mask=in_thought, other=-1)
    live = tl.load(length + thought, mask=in_thought, other=0)
    on = inside & (is_text | ((place >= 0) & (s < live)))
    t = tl.where(is_text, m, place)
    first = tl.load(lo + t, mask=on, other=0)
    stands_at = tl.where(is_text, m, place + 1 + s)
    first = tl.maximum(first, stands_at - window + 1)
    last = tl.where(on, t, -1)
    own_first = tl.where(is_text, m + 1, tl.maximum(m - s, m - window + 1))
    return first, last, own_first, on
