"""What a compiled variant takes of a GPU and what that allows: occupancy, roofline, code.

Occupancy follows the CUDA occupancy calculator: registers are handed out to warps in units of 256
and to four warps at a time (one for each quarter of a multiprocessor), shared memory to programs
with 1 KiB reserved for each, and the scarcest resource decides.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ..kernels._cards import CARDS, LIMITS, Card
from ..kernels._compile import Artefact, compile_variant, faults
from ..kernels._registers import ONE_PROGRAM, listed_as, registers_for
from ..kernels._variants import Variant
from . import sass
from .hazards import hazards

__all__ = [
    "Inspection", "Occupancy", "inspect_variant", "occupancy", "roofline_parts", "roofline_seconds",
    "room_for_two", "waste",
]  # fmt: skip

_REGISTER_UNIT = 256  # registers of a warp are handed out in this many
_QUARTERS = 4  # of a multiprocessor; each has a quarter of the registers and of the warps
_RESERVED_SHARED = 1024  # bytes of shared memory that the system keeps per program
# What a kernel takes at most that does nothing twice. A score has one exponential, and shares
# what a row has; of 16-bit scores without a bias alone, whose layout is that of the products.
_SPECIAL_A_SCORE = 1.6
_MORE_FOR_TWO = 1.05  # times the instructions, at most, for room for a second program
_NARROW = 64  # bits of a thread's load; of rows at most half may come by narrower ones


@dataclass(frozen=True)
class Occupancy:
    """How many programs one multiprocessor holds, and what allows no more.

    Attributes:
        programs: resident at a time; 0 if not even one fits.
        warps: resident at a time.
        share: of the warps that the multiprocessor could hold.
        limit: ``registers``, ``shared memory``, ``warps`` or ``programs``.
    """

    programs: int
    warps: int
    share: float
    limit: str


def occupancy(arch: int, *, registers: int, shared: int, num_warps: int) -> Occupancy:
    """Resident programs of an architecture of `fastbert.kernels._cards.LIMITS`.

    Args:
        registers: per thread.
        shared: bytes per program.
        num_warps: per program.
    """
    limits = LIMITS[arch]
    per_warp = math.ceil(registers * 32 / _REGISTER_UNIT) * _REGISTER_UNIT
    by = {
        "registers": limits.registers // _QUARTERS // per_warp * _QUARTERS // num_warps,
        "shared memory": limits.shared // (shared + _RESERVED_SHARED),
        "warps": limits.warps // num_warps,
        "programs": limits.programs,
    }
    if shared > limits.shared_per_program:
        by["shared memory"] = 0
    limit = min(by, key=by.get)
    programs = by[limit]
    warps = programs * num_warps
    return Occupancy(programs, warps, warps / limits.warps, limit)


def roofline_seconds(variant: Variant, card: Card) -> tuple[float, str]:
    """The least time of the variant's example on a card, and what bounds it.

    Data-sheet rates: 16-bit products on the matrix units, fp32 products on the fp32 units.
    """
    arithmetic, memory = roofline_parts(variant, card)
    return max(arithmetic, memory), "arithmetic" if arithmetic > memory else "memory"


def roofline_parts(variant: Variant, card: Card) -> tuple[float, float]:
    """Seconds of the products and of the traffic of the variant's example, each by itself."""
    wide = variant.dtype == torch.float32
    tf32 = variant.constants.get("INPUT_PRECISION") == "tf32"
    rate = (card.matmul_tf32 if tf32 else card.fp32) if wide else card.matmul_16bit
    return variant.cost.flops / (1e12 * rate), variant.cost.bytes / (1e9 * card.bandwidth)


@dataclass(frozen=True)
class Inspection:
    """A compiled variant, read."""

    variant: Variant
    artefact: Artefact
    occupancy: Occupancy
    faults: list[str]

    @cached_property
    def listing(self) -> sass.Listing:
        """Its instructions."""
        return sass.read(self.artefact.sass)

    @property
    def per_element(self) -> dict[str, float]:
        """Thread instructions of the inner loop per element, by class."""
        threads = 32 * self.variant.num_warps
        return {k: n * threads / self.variant.elements for k, n in self.listing.mix.items()}

    @property
    def matrix_instructions(self) -> str:
        """Which matrix instructions are in it, in words."""
        counts = {"wgmma": self.artefact.wgmma, "mma": self.artefact.mma,
                  "tcgen05": self.artefact.tcgen05}  # fmt: skip
        return ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "none"

    def rooflines(self) -> list[tuple[Card, float, str]]:
        """Least times of the example on the cards of this architecture."""
        return [
            (c, *roofline_seconds(self.variant, c)) for c in CARDS if c.arch == self.variant.arch
        ]

    def seconds(self, card: Card) -> dict[str, float]:
        """What the example takes of each unit of a card, at the rates of its data sheet: its
        memory and its matrix units for the least work, and for the instructions of the inner loop
        the schedulers, which start 128 in a clock, and the units of exponentials.

        The longest is the least time if all of them work side by side; the sum if none does.
        """
        arithmetic, memory = roofline_parts(self.variant, card)
        count, mix = self.variant.count, self.per_element
        lanes = LIMITS[card.arch].special_lanes
        return {
            "memory": memory,
            "products": arithmetic,
            "instructions": sum(mix.values()) * count / (128 * card.lane_clocks),
            "exponentials": mix.get("special", 0.0) * count / (lanes * card.lane_clocks),
        }

    def resources(self) -> dict[str, Any]:
        """What it takes and what is wrong with it, as plain values; nothing of its instructions."""
        a = self.artefact
        return {
            "name": self.variant.name,
            "tile": asdict(self.variant.tile),
            "registers": a.registers,
            "stack": a.stack,
            "spill_stores": a.spill_stores,
            "spill_loads": a.spill_loads,
            "shared": a.shared,
            "programs_per_sm": self.occupancy.programs,
            "warps_per_sm": self.occupancy.warps,
            "occupancy": round(self.occupancy.share, 4),
            "limited_by": self.occupancy.limit,
            "warnings": list(a.warnings),
            "faults": self.faults,
        }

    def facts(self) -> dict[str, Any]:
        """Everything as plain values, for JSON and for comparing."""
        a, v = self.artefact, self.variant
        return {
            **self.resources(),
            "wgmma": a.wgmma,
            "mma": a.mma,
            "tcgen05": a.tcgen05,
            "instructions": self.listing.total,
            "loop": self.listing.loop,
            "per_element": {k: round(n, 3) for k, n in self.per_element.items()},
            "instructions_per_element": round(sum(self.per_element.values()), 3),
            "memory_access": self.listing.widths,
            "intensity": round(v.cost.intensity, 2),
        }


def waste(found: Inspection) -> list[str]:
    """What a variant does twice, or in small pieces, in words; empty if nothing.

    Warps that share no rows of a tile compute all of them each, which shows in the exponentials (in
    fp32, outside the matrix units, they are there for their registers). A row that is too short to
    be read otherwise is read as it can be.
    """
    variant, special = found.variant, found.per_element.get("special", 0.0)
    if variant.element == "score":
        twice = special > _SPECIAL_A_SCORE and variant.dtype.itemsize == 2
        return [f"{special:.2g} exponentials a score"] * twice
    if variant.element == "value":
        bits = Counter()
        for kind, count in found.listing.widths.items():
            name, _, width = kind.rpartition(" ")
            if name != "store":
                bits[int(width) < _NARROW] += int(width) * count
        wide_enough = variant.elements * variant.dtype.itemsize >= 32 * variant.num_warps * 8
        if wide_enough and bits[True] > bits[False]:
            return [f"most is read by loads of less than {_NARROW} bits"]
    return []


def room_for_two(found: Inspection) -> list[str]:
    """Whether a program that is alone on a multiprocessor need not be, in words; empty if it must.

    Where registers allow no more than one, ptxas is asked once more, to do with as many as two
    may have. They fit if that takes no stack and hardly more instructions.
    """
    variant, alone = found.variant, found.occupancy
    listed = listed_as(variant.name)
    if alone.programs != 1 or alone.limit != "registers" or listed in ONE_PROGRAM:
        return []
    if getattr(variant.tile, "max_registers", 0) is not None:  # has a limit, or cannot have one
        return []
    registers = registers_for(2, variant.num_warps)
    two = inspect_variant(replace(variant, tile=replace(variant.tile, max_registers=registers)))
    before, after = (sum(each.per_element.values()) for each in (found, two))
    fits = two.occupancy.programs > 1 and not two.faults and after <= _MORE_FOR_TWO * before
    return [f"alone on a multiprocessor, where two fit with {registers} registers"] * fits


def inspect_variant(variant: Variant, artefact: Artefact | None = None) -> Inspection:
    """Read a variant, which is compiled for that unless it comes compiled.

    Raises:
        Whatever Triton raises for a kernel that does not compile.
    """
    artefact = artefact or compile_variant(variant)
    wrong = faults(variant, artefact)
    if "wgmma" in artefact.matrix_units:
        times = len(hazards(artefact.sass))
        wrong += [f"registers of a product in flight are touched {times} times"] * bool(times)
    found = Inspection(
        variant=variant,
        artefact=artefact,
        occupancy=occupancy(
            variant.arch,
            registers=artefact.registers,
            shared=artefact.shared,
            num_warps=variant.num_warps,
        ),
        faults=wrong,
    )
    found.faults.extend(waste(found))
    return found
