"""What a variant is: a kernel with everything the compiler specialises on, and how one is made.

Which there are is listed in `_variants.py`, those of attention in `_attention_variants.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ._cost import Cost
from ._registers import TYPE_NAMES, variant_name
from ._tiles import AttentionTile, GemmTile, RowTile

__all__ = ["Kernel", "Tile", "Variant", "changed", "make_variant", "up"]

Tile = AttentionTile | GemmTile | RowTile


@dataclass(frozen=True)
class Variant:
    """A kernel with everything the compiler specialises on. Pointers are 16-byte aligned.

    Attributes:
        has_dot: a product of 16-bit values is in it, which has to reach the matrix units.
        elements: values of ``element`` that one program handles in a step of its inner loop, or in
            all if it has no loop.
        example, cost: a typical problem in words, and its least work.
        count: elements in it, those that pad tiles included.
    """

    name: str
    kernel: object
    arch: int
    dtype: torch.dtype
    signature: dict[str, str]
    constants: dict[str, object]
    tile: Tile
    has_dot: bool
    elements: int
    element: str
    example: str
    cost: Cost
    count: float

    @property
    def num_warps(self) -> int:
        return self.tile.num_warps

    @property
    def num_stages(self) -> int:
        return getattr(self.tile, "num_stages", 3)

    @property
    def max_registers(self) -> int | None:
        """Of a thread; None for as many as ptxas likes."""
        return getattr(self.tile, "max_registers", None)


@dataclass(frozen=True)
class Kernel:
    """A kernel for people and tools: what it is, where it is, and its variants."""

    computes: str
    module: object
    op: str
    tile: type
    enumerate: Callable[[int, torch.dtype, dict[str, int]], Iterator[Variant]]


def _signature(kernel, pointers: dict[str, str], constants: dict[str, object]) -> dict[str, str]:
    """Types of all arguments: given for pointers, fp32 for scalars of the mathematics, else i32."""
    scalars = dict.fromkeys(("scale", "scale_log2", "dropout_scale", "eps", "smoothing"), "fp32")
    return {
        name: pointers.get(name) or scalars.get(name, "i32")
        for name in kernel.arg_names
        if name not in constants
    }


def make_variant(
    kernel, label, arch, dtype, pointers, none, constants, tile, elements, example, *, has_dot=False
):  # fmt: skip
    constants = {**dict.fromkeys(none), **constants}
    value = f"*{TYPE_NAMES[dtype]}"
    pointers = {name: kind or value for name, kind in pointers.items()}
    return Variant(
        name=variant_name(kernel, arch, dtype, label),
        kernel=kernel,
        arch=arch,
        dtype=dtype,
        signature=_signature(kernel, pointers, constants),
        constants=constants,
        tile=tile,
        has_dot=has_dot and dtype.itemsize == 2,
        elements=elements[0],
        element=elements[1],
        example=example[0],
        cost=example[1],
        count=float(example[2]),
    )


def up(size: int, block: int) -> int:
    """The multiple of a block that holds this size."""
    return -(-size // block) * block


def changed(tiles: list[Tile], fields: dict[str, int]) -> list[Tile]:
    """The tiles of the tables, or what remains of them with some fields set."""
    return list(dict.fromkeys(dataclasses.replace(tile, **fields) for tile in tiles))
