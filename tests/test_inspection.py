"""What is read of compiled kernels: code, occupancy, seconds of a card's units, and the account."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import forked

pytest.importorskip("triton")
from fastbert.kernels._cards import CARDS, LIMITS, card_named

from fastbert.workbench import sass

ROOT = Path(__file__).resolve().parents[1]

# ---- a kernel whose use of the machine is known ----

KNOWN = '''
"""A copy of one 16-byte vector per thread; with a loop whose body is written down."""
import dataclasses, json, sys, types
import torch, triton, triton.language as tl
from fastbert.kernels._compile import compile_variant
from fastbert.kernels._cost import Cost
from fastbert.kernels._tiles import RowTile
from fastbert.kernels._variants import Variant
from fastbert.workbench.inspection import inspect_variant

@triton.jit
def copy(y_ptr, x_ptr, N: tl.constexpr):
    offs = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))

@triton.jit
def polynomial(y_ptr, x_ptr, steps, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    y = x
    for _ in range(steps):
        for i in tl.static_range(100):  # long enough not to be unrolled
            y = tl.fma(y, x, i + 0.5)
    tl.store(y_ptr + offs, y)

@triton.jit
def stride(y_ptr, x_ptr, step, N: tl.constexpr):
    """Neighbours lie as far apart as somebody says."""
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs * step))

@triton.jit
def hoard(y_ptr, x_ptr, N: tl.constexpr):
    """Needs 512 values of one thread at a time: more than it has registers."""
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    total = tl.sum(x, 0)
    tl.store(y_ptr + offs, x * total)

def variant(kernel, signature, constants, warps, elements):
    return Variant("known", kernel, 80, torch.float32, signature, constants,
                   RowTile(1, constants["N"], warps), False, elements, "value", "",
                   Cost(0.0, 1.0), 1.0)

pointers = {"y_ptr": "*fp32", "x_ptr": "*fp32"}
out = [
    inspect_variant(variant(copy, pointers, {"N": 512}, 4, 512)).facts(),
    inspect_variant(variant(polynomial, {**pointers, "steps": "i32"}, {"N": 32}, 1, 32)).facts(),
    inspect_variant(variant(hoard, pointers, {"N": 16384}, 1, 16384)).facts(),
    inspect_variant(variant(stride, {**pointers, "step": "i32"}, {"N": 512}, 4, 512)).facts(),
]
print(json.dumps(out))
'''


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    path = tmp_path_factory.mktemp("known") / "known.py"
    path.write_text(KNOWN)
    done = forked("import runpy, sys; runpy.run_path(sys.argv[1])", path)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_seconds_of_each_unit_are_those_of_its_rate():
    from fastbert.kernels._cost import Cost

    from fastbert.workbench.inspection import Inspection

    (card,) = (c for c in CARDS if c.name == "H100 SXM")
    assert round(card.lane_clocks / card.sms / 1e9, 2) == 1.98, "its boost clock in GHz"
    # One second of the schedulers' instructions, if an element takes one.
    variant = SimpleNamespace(
        dtype=torch.bfloat16, constants={}, count=128 * card.lane_clocks,
        cost=Cost(flops=2 * 989.4e12, bytes=3 * 3352e9),
    )  # fmt: skip
    inspected = SimpleNamespace(variant=variant, per_element={"float": 3.0, "special": 1.0})
    found = Inspection.seconds(inspected, card)
    assert found == {"memory": 3.0, "products": 2.0, "instructions": 4.0, "exponentials": 8.0}


def test_the_account_is_of_what_is_compiled_now():
    from fastbert.workbench import account

    record = (ROOT / "tests/compiled.txt").read_text()
    text = account.README.read_text()
    compiled = text.partition("<!-- compiled:\n")[2].partition("\n-->")[0].splitlines()
    assert compiled == account.recorded(record), "run python -m fastbert.workbench.account"
    assert len(compiled) == sum(len(account.accounted(arch)) for arch in (80, 89, 90))
    table = text.partition("<!-- account:begin -->\n")[2].partition("\n\n")[0].splitlines()
    kernels = [row.partition("`")[2].partition("`")[0] for row in table[2:]]
    assert kernels == [v.name.replace(" sm_90 bf16", "") for v in account.accounted(90)]
    again = account.rendered(text, iter([("new",)]), iter(["name"]))
    assert "| new |" in again and kernels[0] not in again
    with pytest.raises(ValueError, match="one place"):
        account.rendered("nothing", iter([]), iter([]))


@pytest.mark.slow
def test_a_copy_has_one_wide_load_and_one_wide_store_per_thread(known):
    copy = known[0]
    assert copy["memory_access"] == {"load 128": 1, "store 128": 1}
    assert copy["stack"] == copy["spill_stores"] == copy["spill_loads"] == copy["shared"] == 0
    assert copy["loop"] == 0 and 8 <= copy["registers"] <= 24 and copy["warnings"] == []
    assert copy["wgmma"] == copy["mma"] == 0
    # 4 warps of few registers: 16 programs fill the 64 warps of sm_80, not the 32 programs
    assert (copy["programs_per_sm"], copy["occupancy"], copy["limited_by"]) == (16, 1.0, "warps")


@pytest.mark.slow
def test_a_loop_of_a_hundred_multiply_adds_is_counted_as_a_hundred(known):
    loop = known[1]
    assert loop["per_element"]["float"] == 100.0, "one warp, 32 values: one instruction per value"
    assert loop["per_element"]["branch"] == 1.0
    assert 101 <= loop["loop"] <= 110
    assert loop["memory_access"] == {"load 32": 1, "store 32": 1}


@pytest.mark.slow
def test_a_kernel_with_too_many_values_is_seen_to_spill(known):
    hoard = known[2]
    assert hoard["registers"] >= 64 and hoard["stack"] >= 4 * (512 - 255)
    assert hoard["spill_stores"] > 0 and hoard["spill_loads"] > 0
    assert any("bytes of stack" in fault for fault in hoard["faults"])


@pytest.mark.slow
def test_rows_that_are_read_in_small_pieces_are_refused(known):
    copy, short, _, stride = known
    assert stride["memory_access"] == {"load 32": 4, "store 128": 1}
    assert stride["faults"] == ["most is read by loads of less than 64 bits"]
    assert not copy["faults"] and not short["faults"], "32 values for 32 threads"


def waste_of(special: float, dtype=torch.bfloat16) -> list[str]:
    from fastbert.workbench.inspection import waste

    variant = SimpleNamespace(element="score", dtype=dtype)
    return waste(SimpleNamespace(variant=variant, per_element={"special": special}))


def test_scores_that_are_computed_twice_are_refused():
    assert waste_of(2.06) == ["2.1 exponentials a score"]
    assert not waste_of(1.5) and not waste_of(4.0, torch.float32)


def test_a_program_that_stays_alone_is_known_by_its_name_on_older_cards_too(monkeypatch):
    """sm_86 has the tiles of sm_89, and stands under its name."""
    from fastbert.workbench import inspection

    alone = SimpleNamespace(programs=1, limit="registers")
    asked = []

    def inspect_variant(variant):
        asked.append(variant.name)
        two = SimpleNamespace(programs=2, limit="registers")
        return SimpleNamespace(occupancy=two, per_element={"other": 1.0}, faults=[])

    monkeypatch.setattr(inspection, "inspect_variant", inspect_variant)
    monkeypatch.setattr(inspection, "replace", lambda thing, **changes: thing)
    for name, stays in (
        ("attention_bwd_kernel_dq sm_89 bf16 D32 128x64 packed, dropout 8 bit", True),
        ("attention_bwd_kernel_dq sm_86 bf16 D32 128x64 packed, dropout 8 bit", True),
        ("attention_bwd_kernel_dq sm_86 bf16 D16 128x64 packed, dropout 8 bit", False),
    ):
        variant = SimpleNamespace(name=name, num_warps=8, tile=SimpleNamespace(max_registers=None))
        found = SimpleNamespace(variant=variant, occupancy=alone, per_element={"other": 1.0})
        assert (inspection.room_for_two(found) == []) is stays
        assert (name in asked) is not stays


# ---- reading ----

LISTING = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;
.L_x_1:
        /*0020*/                   FFMA R3, R3, R4, R5 ;
.L_x_0:
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/                   MUFU.EX2 R3, R3 ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   LDGSTS.E.BYPASS.128 [R6], [R8.64] ;
        /*0070*/               @P2 BRA `(.L_x_1) ;
        /*0080*/                   STG.E.U16 [R2.64], R3 ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
        /*00b0*/                   NOP;
"""


def test_the_inner_loop_is_the_innermost_one_with_matrix_instructions():
    found = sass.read(LISTING)
    assert found.total == 11 and found.loop == 3
    assert found.mix == {"matrix": 1, "special": 1, "branch": 1}
    assert found.widths == {"async copy 128": 1, "load 128": 1, "store 16": 1}
    assert found.opcodes["BRA"] == 3
    with pytest.raises(ValueError, match="expected the output of nvdisasm"):
        sass.read("nothing of the kind")


def test_occupancy_follows_the_scarcest_resource():
    from fastbert.workbench.inspection import occupancy

    def of(arch, registers, shared, warps):
        found = occupancy(arch, registers=registers, shared=shared, num_warps=warps)
        return found.programs, found.limit

    # by hand, with the rules of NVIDIA's occupancy calculator
    assert of(80, 32, 0, 4) == (16, "registers")
    assert of(80, 33, 0, 4) == (12, "registers"), "33 registers take as much as 40: 12 per quarter"
    assert of(80, 128, 0, 4) == (4, "registers")
    assert of(80, 168, 0, 4) == (3, "registers")
    assert of(80, 255, 0, 8) == (1, "registers")
    assert of(80, 72, 0, 2) == (14, "registers"), "7 warps a quarter"
    assert of(80, 32, 40 * 1024, 4) == (4, "shared memory")
    assert of(80, 32, 41 * 1024 - 512, 4) == (3, "shared memory"), "1 KiB is kept for each"
    assert of(90, 32, 100 * 1024, 8) == (2, "shared memory")
    assert of(80, 24, 0, 4) == (16, "warps")
    assert of(86, 32, 0, 1) == (16, "programs")
    assert of(89, 32, 0, 1) == (24, "programs")
    assert of(86, 32, 100 * 1024, 4) == (0, "shared memory"), "more than one program may have"


def test_cards_are_found_by_the_names_that_drivers_give():
    for device, card in (
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA B200", "B200"),
    ):
        assert card_named(device) is not None and card_named(device).name == card, device
    assert card_named("AMD EPYC") is None
    assert {card.arch for card in CARDS} == set(LIMITS)
