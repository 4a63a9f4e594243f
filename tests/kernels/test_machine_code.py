"""The reader of disassemblies, on a few lines of one."""

import machine_code

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
