"""GPUs as data: what a streaming multiprocessor holds, and what data sheets say of named cards.

Limits of a multiprocessor are those of the CUDA programming guide's table of compute capabilities;
rates are the dense ones of NVIDIA's data sheets and architecture papers (16-bit products with fp32
accumulation). A rate that was measured belongs beside its measurement, not here.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CARDS", "LIMITS", "Card", "SMLimits", "card_named"]


@dataclass(frozen=True)
class SMLimits:
    """What one streaming multiprocessor can hold at a time."""

    registers: int  # 32-bit
    warps: int
    programs: int
    shared: int  # bytes
    shared_per_program: int  # bytes, most that one program may ask for
    fp32_lanes: int = 128  # fp32 operations of a clock; it starts 128 of all kinds
    special_lanes: int = 16  # of exponentials and the like


_KIB = 1024
LIMITS = {
    80: SMLimits(65536, 64, 32, 164 * _KIB, 163 * _KIB, fp32_lanes=64),
    86: SMLimits(65536, 48, 16, 100 * _KIB, 99 * _KIB),
    89: SMLimits(65536, 48, 24, 100 * _KIB, 99 * _KIB),
    90: SMLimits(65536, 64, 32, 228 * _KIB, 227 * _KIB),
    100: SMLimits(65536, 64, 32, 228 * _KIB, 227 * _KIB),
    120: SMLimits(65536, 48, 24, 100 * _KIB, 99 * _KIB),
}


@dataclass(frozen=True)
class Card:
    """A product: multiprocessors, dense rates in TFLOP/s, memory in GB/s."""

    name: str
    arch: int
    sms: int
    matmul_16bit: float
    matmul_tf32: float
    fp32: float
    bandwidth: float

    @property
    def lane_clocks(self) -> float:
        """Instructions of one lane that all multiprocessors could start in a second, one a clock,
        at the clock that its fp32 rate is of."""
        return 1e12 * self.fp32 / 2 / LIMITS[self.arch].fp32_lanes


CARDS = (
    Card("A100 SXM 80GB", 80, 108, 312.0, 156.0, 19.5, 2039.0),
    Card("A100 SXM 40GB", 80, 108, 312.0, 156.0, 19.5, 1555.0),
    Card("A10", 86, 72, 125.0, 62.5, 31.2, 600.0),
    Card("RTX 3090", 86, 82, 71.0, 35.6, 35.6, 936.0),
    Card("L4", 89, 58, 121.0, 60.0, 30.3, 300.0),
    Card("L40S", 89, 142, 362.0, 183.0, 91.6, 864.0),
    Card("RTX 4090", 89, 128, 165.2, 82.6, 82.6, 1008.0),
    Card("H100 PCIe", 90, 114, 756.0, 378.0, 51.2, 2039.0),
    Card("H100 SXM", 90, 132, 989.4, 494.7, 66.9, 3352.0),
    Card("H200", 90, 132, 989.4, 494.7, 66.9, 4800.0),
    Card("B200", 100, 148, 2250.0, 1125.0, 75.0, 8000.0),
    Card("RTX 5090", 120, 170, 209.5, 104.8, 104.8, 1792.0),
)


def card_named(device_name: str) -> Card | None:
    """The card whose words all occur in a device's name as the driver gives it, or None.

    The most specific one wins: ``"NVIDIA H100 80GB HBM3"`` says neither SXM nor PCIe, and HBM3 is
    what the SXM board has.
    """
    words = device_name.upper().replace("-", " ")
    words += " SXM" if "HBM3" in words else ""
    fits = [card for card in CARDS if all(w in words for w in card.name.upper().split())]
    return max(fits, key=lambda card: len(card.name), default=None)
