"""The readers of disassemblies and of PTX, on a few lines of each."""

import fences
import machine_code
import pytest

LOOP = """
        /*0100*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R8.64] ;
        /*0110*/                   LDGDEPBAR ;
        /*0120*/                   {wait_for_copies} ;
        /*0130*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], {first}, gsb0 ;
        /*0140*/                   {between} ;
        /*0150*/                   HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR12], R24, gsb0 ;
        /*0160*/                   LDS.64 R4, [R5] ;
        /*0170*/              @!P0 BRA 0x100 ;
        /*0180*/                   EXIT ;
"""


def loop(wait_for_copies="DEPBAR.LE SB0, 0x1", first="RZ, !UPT", between="NOP"):
    text = LOOP.format(wait_for_copies=wait_for_copies, first=first, between=between)
    (only,) = machine_code.loops(machine_code.instructions(text))
    return only


def test_products_that_wait_for_the_one_before():
    assert loop().serialised == 0
    assert loop(between="WARPGROUP.DEPBAR.LE gsb0, 0x0").serialised == 1
    assert loop(between="WARPGROUP.DEPBAR.LE gsb0, 0x1").serialised == 0


def test_copies_in_flight():
    assert loop().in_flight == 1
    assert loop(wait_for_copies="DEPBAR.LE SB0, 0x0").in_flight == 0


def test_a_barrier_between_copies_and_reads():
    assert not loop().ordered
    assert loop(wait_for_copies="DEPBAR.LE SB0, 0x1 ;\n        /*0128*/ BAR.SYNC.DEFER_BLOCKING 0x0").ordered


def test_barriers():
    assert (loop().barriers, loop().group_barriers) == (0, 0)
    assert loop(between="BAR.SYNC.DEFER_BLOCKING 0x0").barriers == 1
    assert loop(between="BAR.SYNC.DEFER_BLOCKING 0x2, 0x80").group_barriers == 1


PTX = """
    mov.b32 %r1, global_smem;
    shl.b32 %r2, %r9, 14;
    add.s32 %r3, %r1, %r2;
    add.s32 %r4, %r3, 98304;
    bfe.u32 %r5, %r4, 4, 14;
    cvt.u64.u32 %rd1, %r5;
    or.b64 %rd2, %rd1, 4611686293305294848;
    st.shared.v4.b32 [%r3+{place}], {{%r10, %r11, %r12, %r13}};
    {after_store};
    bar.sync 0, 128;
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{%r20, %r21}}, {{%r10, %r11, %r12, %r13}}, %rd2, %p1, 1, 1, 1;
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r4], {{%r10, %r11, %r12, %r13}};
    bar.sync 0, 128;
    ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r4];
    {after_load};
    bar.sync 0, 128;
    @%p1 mbarrier.arrive.shared::cta.b64 _, [%r8];
"""
FENCE = "fence.proxy.async.shared::cta"


@pytest.mark.parametrize(
    "lines, missing",
    [
        ({}, []),
        ({"after_store": ""}, ["wgmma"]),
        ({"after_store": "bar.sync 0, 128; \n" + FENCE + ";\n st.shared.b32 [%r3+8], %r1"}, []),
        ({"after_store": "", "place": 139264}, []),  # that no product reads
        ({"after_load": ""}, ["mbarrier"]),
    ],
    ids=str,
)
def test_fences_between_stores_and_products(lines, missing):
    ptx = PTX.format(**{"place": 98304, "after_store": FENCE, "after_load": FENCE} | lines)
    found = fences.missing(ptx)
    assert [name for line, name in zip(found, missing, strict=True) if name in line] == missing
    assert len(fences.missing_without(ptx)) == ptx.count(FENCE)
