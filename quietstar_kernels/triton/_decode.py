import torch, triton
import triton.language as tl
from torch import Tensor
from quietstar_kernels.layout import ThoughtLayout
from quietstar_kernels.triton._decode_parts import attend, cap
from quietstar_kernels.triton._target import target
from quietstar_kernels.triton.configs import Config

LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1e30)

@triton.jit(
    do_not_specialize=["anchor_b", "lo_b", "length_b", "thoughts", "N", "L", "H", "G", "tiles", "splits", "window"],
    do_not_specialize_on_alignment=["anchor", "lo", "length", "step", "sinks"],
)
def _decode(
    q, k_text, v_text, k_own, v_own, anchor, lo, length, step, sinks, out, part_out, part_state,
    q_b, q_h, q_t, kt_b, kt_g, kt_l, vt_b, vt_g, vt_l, ko_b, ko_g, ko_t, ko_s, vo_b, vo_g, vo_t, vo_s,
    anchor_b, lo_b, length_b, thoughts, N, L, H, G, tiles, splits,
    window, unit, cap_in, cap_out,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    K: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    FOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TAIL: tl.constexpr, OWN_STAGES: tl.constexpr,
):
    BLOCK_T: tl.constexpr = BLOCK_M // FOLD
    pid = tl.program_id(0)
    split = tl.program_id(1)
    HG = H // G
    chunks = tl.cdiv(HG, FOLD)
    tile = tiles - 1 - pid % tiles
    chunk = pid // tiles % chunks
    g = (pid // tiles // chunks % G).to(tl.int64)
    b = (pid // tiles // chunks // G).to(tl.int64)
    now = tl.load(step).to(tl.int32)

    row = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_K)
    e = tl.arange(0, BLOCK_E)
    thought = tile * BLOCK_T + row // FOLD
    in_group = chunk * FOLD + row % FOLD
    inside = (thought < thoughts) & (in_group < HG)
    head = g * HG + in_group
    place = tl.load(anchor + b * anchor_b + thought // N, mask=inside, other=-1)
    live = tl.load(length + b * length_b + thought, mask=inside, other=0)
    on = (place >= 0) & (now < live)
    lo += b * lo_b
    first = tl.load(lo + place, mask=on, other=0)
    last = tl.where(on, place, -1)

    begin = tl.min(tl.where(on, first, L))
    end = tl.max(last) + 1
    common_begin = tl.max(tl.where(on, first, 0))
    common_end = tl.min(tl.where(on, place, L)) + 1
    oldest = place - first + 1 + now - window
    if WINDOWED:
        lowest = tl.min(tl.where(on, oldest, L))
        highest = tl.max(tl.where(on, oldest, -1))
        cols = tl.arange(0, 1024)
        any_begin = end
        for c in range(begin, end, 1024):
            j = c + cols
            position = j - tl.load(lo + j, mask=j < end, other=0)
            any_begin = tl.minimum(any_begin, tl.min(tl.where((j < end) & (position > lowest), j, end)))
            common_begin = tl.maximum(common_begin, tl.max(tl.where((j < common_end) & (position <= highest), j + 1, 0)))
        begin = any_begin

    own_begin = tl.maximum(now + 1 - window, 0) if WINDOWED else 0
    own_end = tl.where((end > 0) & (split == 0), now + 1, 0)
    per = tl.cdiv(tl.cdiv(end - begin, splits), BLOCK_N) * BLOCK_N
    begin += split * per
    end = tl.minimum(end, begin + per)

    m = tl.full([BLOCK_M], NOTHING, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:
        if split == 0:
            m = tl.load(sinks + head, mask=inside, other=0).to(tl.float32) * LOG2E
            l += 1
    qs = tl.load(q + b * q_b + (head * q_h + thought.to(tl.int64) * q_t)[:, None] + d, mask=on[:, None] & (d < K), other=0)
    k_own += b * ko_b + g * ko_g
    v_own += b * vo_b + g * vo_g
    GROUPS: tl.constexpr = BLOCK_M // 16
    q3 = tl.reshape(qs, [GROUPS, 16, BLOCK_K])
    m3 = tl.reshape(m, [GROUPS, 16])
    l3 = tl.reshape(l, [GROUPS, 16])
    acc3 = tl.zeros([GROUPS, 16, BLOCK_E], tl.float32)
    key = tl.arange(0, 16)
    same = key[:, None] // FOLD == key[None, :] // FOLD
    own_thought = tile * BLOCK_T + tl.arange(0, GROUPS)[:, None] * (16 // FOLD) + key[None, :] // FOLD
    inside_t = own_thought < thoughts
    on_t = tl.load(anchor + b * anchor_b + own_thought // N, mask=inside_t, other=-1) >= 0
    on_t &= now < tl.load(length + b * length_b + own_thought, mask=inside_t, other=0)
    for j0 in tl.range(own_begin, own_end, FOLD, num_stages=OWN_STAGES):
        jj = j0 + key % FOLD
        seen = on_t & (jj < own_end)[None, :]
        k = tl.load(k_own + (own_thought * ko_t + jj * ko_s)[:, :, None] + d[None, None, :], mask=seen[:, :, None] & (d < K)[None, None, :], other=0)
        s = tl.dot(q3, tl.permute(k, (0, 2, 1)), input_precision=PRECISION)
        s = tl.where((same & (jj < own_end)[None, :])[None, :, :], cap(s, unit, cap_in, cap_out, CAPPED), -float("inf"))
        v = tl.load(v_own + (own_thought * vo_t + jj * vo_s)[:, :, None] + e[None, None, :], mask=seen[:, :, None] & (e < E)[None, None, :], other=0)
        acc3, m3, l3 = attend(acc3, m3, l3, s, v, 2, PRECISION)
    acc = tl.reshape(acc3, [BLOCK_M, BLOCK_E])
    m = tl.reshape(m3, [BLOCK_M])
    l = tl.reshape(l3, [BLOCK_M])

    k_text += b * kt_b + g * kt_g
    v_text += b * vt_b + g * vt_g
    head_blocks = tl.cdiv(tl.maximum(tl.minimum(common_begin, end) - begin, 0), BLOCK_TAIL)
    full_begin = begin + head_blocks * BLOCK_TAIL
    full = tl.maximum(tl.minimum(common_end, end) - full_begin, 0) // BLOCK_N * BLOCK_N
    tail_blocks = tl.cdiv(tl.maximum(end - full_begin - full, 0), BLOCK_TAIL)
    for c in range(full_begin, full_begin + full, BLOCK_N):
        j = (c + tl.arange(0, BLOCK_N))[:, None]
        k = tl.load(k_text + j * kt_l + d, mask=d < K, other=0)
        v = tl.load(v_text + j * vt_l + e, mask=e < E, other=0)
        s = cap(tl.dot(qs, tl.trans(k), input_precision=PRECISION), unit, cap_in, cap_out, CAPPED)
        acc, m, l = attend(acc, m, l, s, v, 1, PRECISION)
    for i in range(head_blocks + tail_blocks):
        j = begin + i * BLOCK_TAIL + tl.where(i >= head_blocks, full, 0) + tl.arange(0, BLOCK_TAIL)
        seen = (j[None, :] >= first[:, None]) & (j[None, :] <= last[:, None]) & (j < end)[None, :]
        if WINDOWED:
            seen &= (j - tl.load(lo + j, mask=j < end, other=0))[None, :] > oldest[:, None]
        some = tl.max(seen.to(tl.int32), 0) > 0
        far = j[:, None]
        k = tl.load(k_text + far * kt_l + d, mask=some[:, None] & (d < K), other=0)
        v = tl.load(v_text + far * vt_l + e, mask=some[:, None] & (e < E), other=0)
        s = cap(tl.dot(qs, tl.trans(k), input_precision=PRECISION), unit, cap_in, cap_out, CAPPED)
        acc, m, l = attend(acc, m, l, tl.where(seen, s, -float("inf")), v, 1, PRECISION)

    acc = tl.where(on[:, None], acc, 0)
    l = tl.where(on, l, 1)
    at = (b * H + head) * thoughts + thought
    mask = inside[:, None] & (e < E)
    if splits == 1:
        tl.store(out + at[:, None] * E + e, (acc / l[:, None]).to(out.dtype.element_ty), mask=mask)
    else:
        at += split.to(tl.int64) * (tl.num_programs(0) // tiles // chunks // G).to(tl.int64) * H * thoughts
        tl.store(part_out + at[:, None] * E + e, acc, mask=mask)
        tl.store(part_state + 2 * at, tl.where(on, m, 0), mask=inside)
        tl.store(part_state + 2 * at + 1, l, mask=inside)


CONFIG = None

def thought_decode(q, k_text, v_text, k_own, v_own, layout, step, scale, window, softcap, sinks):
    B, H, thoughts, K = q.shape
    G, L, E = v_text.shape[1:]
    out = q.new_empty((B, H, thoughts, E))
    heads = H // G
    fold = min(triton.next_power_of_2(heads), 16)
    config = CONFIG
    T = config.blocks["BLOCK_M"] // fold
    tiles = triton.cdiv(thoughts, T)
    splits = 1
    part_out = q.new_empty(0, dtype=torch.float32)
    strides = [s for x in (q, k_text, v_text, k_own, v_own) for s in x.stride()[:-1]]
    cap_in, cap_out = (0.0, 0.0) if softcap is None else (scale / softcap, softcap * LOG2E.value)
    _decode[(B * G * triton.cdiv(heads, fold) * tiles, splits)](
        q, k_text, v_text, k_own, v_own, layout.anchor, layout.lo, layout.length, step, sinks, out, part_out, part_out,
        *strides, layout.anchor.stride(0), layout.lo.stride(0), layout.length.stride(0), thoughts, layout.N, L, H, G, tiles, splits,
        window or 0, scale * LOG2E.value, cap_in, cap_out,
        WINDOWED=window is not None, CAPPED=softcap is not None, PRECISION="ieee" if target() in ("gfx942", "interpreter") else "tf32x3",
        K=K, E=E, BLOCK_K=max(16, triton.next_power_of_2(K)), BLOCK_E=max(16, triton.next_power_of_2(E)),
        FOLD=fold, **config.options())
    return out
