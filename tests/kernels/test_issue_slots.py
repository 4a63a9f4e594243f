"""The model of clocks: what the kernels should take on an H200, next to their previous version. Nothing is measured."""

import pytest

from quietstar_kernels import ThoughtLayout

pytest.importorskip("triton")

import issue_slots as model  # noqa: E402

from quietstar_kernels.triton import configs  # noqa: E402

LENGTHS = (256, 512, 1024, 2048, 4096)
GROUPS = (1, 4, 8)
STEP = 12  # of decoding; thoughts have 14 rows


LAYOUTS = {(group, L): ThoughtLayout.every_position(1, L, 2, 14) for group in GROUPS for L in LENGTHS}


def table(what, rows):
    """The table that is printed at the end; ``rows`` are the lines, by (H/G, L)."""
    head = f"{what}, heads of 128 on sm_90, N 2, S 14, clocks of a key head: a model, no measurement"
    return "\n".join([head, *(f"  H/G {group}  L {L:>4}  {line}" for (group, L), line in rows.items())])


def units(*parts):
    """Thousands of clocks of each unit, summed over kernels."""
    return "  ".join(f"{unit} {sum(getattr(x, unit) for x in parts) / 1e3:>6.0f}k" for unit in model.Clocks._fields)


def test_codes_are_of_the_shipped_tiles():
    for code, where in (
        (model.FORWARD, configs.ATTENTION_FORWARD),
        (model.FORWARD_SHORT, configs.ATTENTION_FORWARD_SHORT),
        (model.QUERIES, configs.ATTENTION_BACKWARD_QUERIES),
        (model.TEXT_KEYS, configs.ATTENTION_BACKWARD_TEXT_KEYS),
        (model.OWN_KEYS, configs.ATTENTION_BACKWARD_OWN_KEYS),
        (model.DECODE, configs.THOUGHT_DECODE),
        (model.DECODE_SHORT, configs.THOUGHT_DECODE_SHORT),
    ):
        config = where["sm_90", 2, model.WIDTH]
        assert code.blocks.items() <= config.blocks.items() and code.warps == config.num_warps


def test_forward(record_property):
    """Short texts, which instructions bound, take a sixth less than before; long ones hardly more."""
    rows, ratios = {}, {}
    for (group, L), layout in LAYOUTS.items():
        code = model.FORWARD_SHORT if L <= configs.SHORT else model.FORWARD
        before, now = (model.query_rows(layout, group, x) for x in (model.OLD_FORWARD, code))
        useful = model.useful(layout, group)
        rows[group, L] = f"{units(now)}  share of peak {useful / max(before):.2f} -> {useful / max(now):.2f}"
        ratios[group, L] = max(now) / max(before)
    record_property("table", table("forward", rows))
    assert all(ratio <= (0.85 if L <= 1024 else 1.1) for (_, L), ratio in ratios.items()), ratios


def test_backward(record_property):
    """Bound by shared memory: of the products of dk and dv half have 32 columns, which take longer to read than to multiply."""
    rows, instructions = {}, {}
    for key, layout in LAYOUTS.items():
        before = model.backward(layout, key[0], model.OLD_QUERIES, model.OLD_TEXT_KEYS, model.OLD_OWN_KEYS)
        now = model.backward(layout, key[0], model.QUERIES, model.TEXT_KEYS, model.OWN_KEYS)
        useful = 2.5 * model.useful(layout, key[0])
        shares = [useful / sum(map(max, x)) for x in (before, now)]
        rows[key] = f"{units(*now)}  share of peak {shares[0]:.2f} -> {shares[1]:.2f}"
        instructions[key] = sum(x.issue for x in now) / sum(x.issue for x in before)
    record_property("table", table("backward", rows))
    assert max(instructions.values()) <= 0.95, instructions


def test_decode(record_property):
    """Memory is the lower bound; with many heads or long texts, products are."""
    rows, ratios = {}, {}
    for (group, L), layout in LAYOUTS.items():
        code = model.DECODE_SHORT if L <= configs.DECODE_SHORT else model.DECODE
        before, now = (model.decode(layout, group, STEP, x) for x in (model.OLD_DECODE, code))
        reading = model.reading(layout, group, STEP)
        shares = [reading / max(*x, reading) for x in (before, now)]
        rows[group, L] = f"{units(now)}  memory {reading / 1e3:>5.0f}k  share of it {shares[0]:.2f} -> {shares[1]:.2f}"
        ratios[group, L] = max(now) / max(before)
    record_property("table", table(f"decode, step {STEP}", rows))
    assert max(ratios.values()) <= 1.3, ratios
