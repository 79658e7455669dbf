"""What touches the registers of a warp-group product that is in flight, in programs made up."""

import pytest

from fastbert.workbench.hazards import hazards

START = """
HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR4], RZ, !UPT ;
HGMMA.64x64x16.F32.BF16 R24, R92, gdesc[UR8], R24, gsb0 ;
"""
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n"
END = "EXIT ;\n"


def listing(program: str) -> str:
    """As nvdisasm prints it."""
    lines = [line.strip() for line in program.strip().splitlines()]
    return "\n".join(
        line if line.startswith(".L") else f"        /*{16 * i:04x}*/                   {line}"
        for i, line in enumerate(lines)
    )


def touched(program: str) -> list[str]:
    return [each.partition(" before")[0] for each in hazards(listing(program))]


@pytest.mark.parametrize(
    "instruction",
    [
        "MOV R91, R3",  # an operand
        "LDS.128 R84, [R2]", "LDS.128 R92, [R2]", "LDSM.16.M88.4 R93, [R2]",
        "IMAD.WIDE R94, R2, 0x4, R4",
        "SHFL.BFLY PT, R90, R2, 0x1, 0x1f",
        "FADD R3, R24, R5",  # an accumulator
        "FADD R55, R4, R5", "STS.128 [R2], R52", "FSETP.GT.AND P0, PT, R30, R2, PT",
        "@P0 MOV R24, R3",
    ],
)  # fmt: skip
def test_a_register_in_flight(instruction):
    clean = instruction == "LDS.128 R84, [R2]"  # up to R87
    found = touched(f"{START}{instruction} ;\n{WAIT}{END}")
    assert bool(found) is not clean
    assert not touched(f"{START}{WAIT}{instruction} ;\n{END}")


@pytest.mark.parametrize(
    "instruction",
    [
        "FADD R3, R88, R89",  # an operand may be read
        "STG.E.128 [R2.64], R88", "ISETP.GE.AND P0, PT, R88, R2, PT", "FADD R56, R4, R5",
        "HGMMA.64x64x16.F32.BF16 R24, R100, gdesc[UR8], R24, gsb0",  # its own sum goes on
    ],
)  # fmt: skip
def test_what_may_be_done_meanwhile(instruction):
    assert not touched(f"{START}{instruction} ;\n{WAIT}{END}")


def test_a_wait_for_all_but_the_last():
    two = START + START.replace("R24", "R120").replace("R88", "R104").replace("R92", "R108")
    wait = WAIT.replace("0x0", "0x1")
    assert not touched(f"{two}{wait}MOV R88, R3 ;\n{WAIT}{END}")
    assert touched(f"{two}{wait}MOV R108, R3 ;\n{WAIT}{END}") == ["MOV R108, R3"]


def test_the_next_round_of_a_loop():
    """Nothing is wrong until the program goes back."""
    loop = f".L_x_1:\nMOV R88, R3 ;\n{START}@P0 BRA `(.L_x_1) ;\n{WAIT}{END}"
    assert touched(loop) == ["MOV R88, R3"]
    assert not touched(loop.replace("@P0 BRA", f"{WAIT}@P0 BRA"))


@pytest.mark.parametrize("branch", ["@P0 BRA `(.L_x_1)", "BRA.U UP0, `(.L_x_1)"])
def test_both_ways_of_a_branch(branch):
    program = f"{START}{branch} ;\n%s\n.L_x_1:\n{WAIT}{END}"
    assert touched(program % "MOV R88, R3 ;") == ["MOV R88, R3"]
    assert not touched(program % f"{WAIT}MOV R88, R3 ;")
    unreached = program.replace(branch, "BRA `(.L_x_1)")
    assert not touched(unreached % "MOV R88, R3 ;")
