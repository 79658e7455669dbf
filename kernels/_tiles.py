"""Tiles as data: which block sizes, warps and stages a kernel runs with.

Every choice is a pure function of sizes, dtype and architecture, so that it can be tested without
a GPU and compiled ahead of time; nothing is tuned in a user's first call. The tables come from
compiling candidates for each architecture and dropping what spills, serialises its matrix
instructions or overflows shared memory (tests/test_kernel_compile.py does so for every entry).
Among the survivors the choice was timed on an H100 for sm_90 in 16 bits without a bias; elsewhere
it follows published tile sizes and **has not been timed**.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path

import torch

__all__ = [
    "ARCHITECTURES",
    "AttentionBwdTiles",
    "AttentionTile",
    "GemmTile",
    "RowTile",
    "attention_bounds",
    "attention_bwd_bounds",
    "attention_bwd_tiles",
    "attention_bwd_tiles_of",
    "attention_tile",
    "attention_tiles",
    "bias_activation_tile",
    "cdiv",
    "cross_entropy_tile",
    "gemm_tile",
    "layernorm_bwd_tile",
    "layernorm_tile",
    "linear_route",
    "softmax_tile",
    "tuned",
]

ARCHITECTURES = (80, 89, 90)
MAX_HEAD_DIM = 128
_ANY = 2**31 - 1  # tokens, which no sequence exceeds
MAX_ROW = 8192


@dataclass(frozen=True)
class AttentionTile:
    """Queries and keys per step, the padded head size; ``single``: one step holds all keys;
    ``max_registers`` of a thread, or None for as many as ptxas likes (`_registers.limited`)."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    single: bool
    max_registers: int | None = None


@dataclass(frozen=True)
class AttentionBwdTiles:
    """The tiles of backward: one program for a whole sequence where it fits, else two kernels;
    and the kernel for the gradient of a bias."""

    whole: AttentionTile
    dq: AttentionTile
    dkdv: AttentionTile
    bias: AttentionTile
    is_whole: bool


@dataclass(frozen=True)
class GemmTile:
    """An output tile, the reduction step, and how many row tiles share their columns in cache."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclass(frozen=True)
class RowTile:
    """Rows per program and the power of two that a row is padded to."""

    rows: int
    block_n: int
    num_warps: int


def _known(arch: int) -> int:
    """The architecture whose tables serve ``arch``: the newest one that is not newer.

    sm_86, and sm_120 with its kin, the Blackwell without tensor memory, have the shared memory and
    the matrix instructions of sm_89 (CUDA programming guide, compute capabilities 8.6 and 12.x).
    """
    if arch == 86 or arch // 10 == 12:
        return 89
    known = ARCHITECTURES[0]
    for each in ARCHITECTURES:  # a plain loop, which a compiler can follow
        known = each if each <= arch else known
    return known


TUNED_FILE = Path(__file__).with_name("tuned.json")
# "sm_90" -> slot -> fields: what ``fastbert kernels tune`` measured to be better than the tables.
_tuned: dict[str, dict[str, dict[str, int]]] = (
    json.loads(TUNED_FILE.read_text("utf-8")) if TUNED_FILE.exists() else {}
)


def _choose(slot: str, arch: int, tile):
    """The tile of the tables, with the fields that were tuned for this very architecture."""
    fields = _tuned.get(f"sm_{arch}", {}).get(slot)
    return dataclasses.replace(tile, **fields) if fields else tile


_remembered: list[Callable] = []


def _remember(choose: Callable) -> Callable:
    """Decorator of a function that chooses a tile by few values, in every launch."""
    kept = lru_cache(maxsize=4096)(choose)
    _remembered.append(kept)

    @wraps(choose)
    def chosen(*args, **named):
        # A compiler cannot look into what is kept.
        return (choose if torch.compiler.is_compiling() else kept)(*args, **named)

    return chosen


@contextmanager
def tuned(arch: int, slot: str, fields: dict[str, int]) -> Iterator[None]:
    """Use these fields for a slot within a block: for the tuner."""
    table = _tuned.setdefault(f"sm_{arch}", {})
    before = table.get(slot)
    table[slot] = fields
    _forget()
    try:
        yield
    finally:
        if before is None:
            del table[slot]
        else:
            table[slot] = before
        _forget()


def _forget() -> None:
    for kept in _remembered:
        kept.cache_clear()


def cdiv(n: int, by: int) -> int:
    """How many parts of this size cover ``n``. (Triton's own takes microseconds on the host.)"""
    return -(-n // by)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


# Padded head size -> tiles (block_m, block_n, warps, stages). The first ones hold all keys in one
# step, shortest first; the last walks over keys. 16-bit tables by architecture, without and with a
# bias, which takes registers of its own.
_Tiles = tuple[tuple[int, int, int, int], ...]
_AMPERE: dict[bool, dict[int, _Tiles]] = {
    False: {
        16: ((64, 64, 4, 1), (64, 128, 4, 1), (128, 64, 8, 3)),
        32: ((64, 64, 4, 1), (64, 128, 4, 1), (128, 64, 8, 3)),
        64: ((64, 64, 4, 1), (64, 128, 4, 1), (64, 64, 4, 3)),
        128: ((64, 64, 4, 1), (64, 128, 4, 1), (128, 32, 8, 2)),
    },
    True: {
        16: ((64, 64, 4, 1), (64, 128, 4, 1), (64, 64, 4, 3)),
        32: ((64, 64, 4, 1), (64, 128, 4, 1), (128, 32, 8, 2)),
        64: ((64, 64, 4, 1), (64, 128, 4, 1), (64, 64, 4, 3)),
        128: ((64, 64, 4, 1), (32, 64, 4, 2)),
    },
}
# sm_89 runs out of registers where sm_80 does not.
_ADA: dict[bool, dict[int, _Tiles]] = {
    False: {**_AMPERE[False], 128: ((64, 64, 4, 1), (64, 128, 4, 1), (32, 64, 4, 2))},
    True: _AMPERE[True],
}
_HOPPER: dict[bool, dict[int, _Tiles]] = {
    False: {
        16: ((64, 64, 4, 1), (64, 128, 4, 1), (64, 64, 4, 3)),
        32: ((64, 64, 4, 1), (64, 128, 4, 1), (64, 64, 4, 3)),
        64: ((64, 64, 4, 1), (128, 128, 8, 1), (128, 64, 8, 3)),
        128: ((64, 64, 4, 1), (64, 128, 4, 1), (64, 64, 4, 3)),
    },
    True: {
        16: ((64, 64, 4, 1), (64, 128, 4, 1), (64, 64, 4, 3)),
        32: ((64, 64, 4, 1), (64, 128, 4, 1), (64, 64, 4, 2)),
        64: ((64, 64, 4, 1), (64, 128, 4, 1), (64, 64, 4, 3)),
        128: ((64, 64, 4, 1), (64, 128, 4, 1), (64, 64, 4, 2)),
    },
}
_ATTENTION = {80: _AMPERE, 89: _ADA, 90: _HOPPER}
# fp32 products run outside the matrix units, on operands in registers: small tiles.
_FP32: dict[int, _Tiles] = {
    16: ((16, 32, 4, 1), (16, 32, 4, 3)),
    32: ((16, 32, 4, 1), (16, 32, 4, 1)),
    64: ((32, 32, 8, 1), (32, 32, 8, 2)),
    128: ((16, 32, 8, 1), (16, 32, 8, 1)),
}
_ATTENTION_FP32 = {80: _FP32, 89: _FP32, 90: {**_FP32, 128: ((16, 32, 8, 1), (32, 16, 8, 1))}}


@_remember
def attention_tile(
    *,
    head_dim: int,
    dtype: torch.dtype,
    arch: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    has_bias: bool = False,
) -> AttentionTile:
    """The tile for sequences of at most these lengths, by `attention_bounds`.

    Raises:
        NotImplementedError: a head larger than 128.
    """
    if head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"attention: the kernels support head sizes up to {MAX_HEAD_DIM}, got {head_dim}"
        )
    block_d = max(16, next_power_of_2(head_dim))
    if dtype.itemsize == 2:
        *whole, walking = _ATTENTION[_known(arch)][has_bias][block_d]
    else:
        *whole, walking = _ATTENTION_FP32[_known(arch)][block_d]
    slot = f"attention D{block_d} {8 * dtype.itemsize} bit{' bias' if has_bias else ''}"
    for block_m, block_n, num_warps, num_stages in whole:
        if max_seqlen_k <= block_n:
            tile = AttentionTile(block_m, block_n, block_d, num_warps, num_stages, single=True)
            return _choose(f"{slot} S<={block_n}", arch, tile)
    block_m, block_n, num_warps, num_stages = walking
    tile = AttentionTile(block_m, block_n, block_d, num_warps, num_stages, single=False)
    return _choose(f"{slot} long", arch, tile)


def attention_tiles(
    arch: int, dtype: torch.dtype, head_dim: int, has_bias: bool
) -> list[AttentionTile]:
    """Every tile that `attention_tile` can return for these, by length of the keys."""
    tiles = [
        attention_tile(
            head_dim=head_dim,
            dtype=dtype,
            arch=arch,
            max_seqlen_q=length,
            max_seqlen_k=length,
            has_bias=has_bias,
        )
        for length in (1, 33, 65, 129, 8192)
    ]
    return list(dict.fromkeys(tiles))


@_remember
def attention_bounds(
    arch: int, dtype: torch.dtype, head_dim: int, has_bias: bool
) -> tuple[tuple[int, int], ...]:
    """How many queries and keys a sequence has at most for each tile that holds all its keys."""
    tiles = attention_tiles(arch, dtype, head_dim, has_bias)
    return tuple((_ANY, tile.block_n) for tile in tiles if tile.single)


# Padded head size -> (block_m, block_n, warps, stages) of the kernels whole (more than one, for the
# shortest sequences first), dq, dkdv and bias.
_BwdTiles = dict[int, _Tiles]
_AMPERE_BWD: dict[bool, _BwdTiles] = {
    False: {
        16: ((128, 128, 8, 1), (128, 64, 8, 3), (64, 128, 8, 3), (64, 64, 8, 2)),
        32: ((64, 64, 4, 1), (128, 64, 8, 2), (64, 128, 8, 3), (64, 32, 8, 1)),
        64: ((64, 64, 4, 1), (64, 32, 4, 2), (32, 64, 4, 2), (64, 64, 8, 1)),
        128: ((64, 64, 8, 1), (32, 32, 4, 2), (64, 32, 8, 1), (32, 32, 8, 1)),
    },
    True: {
        16: ((64, 64, 4, 1), (64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 2)),
        32: ((64, 64, 4, 1), (64, 32, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2)),
        64: ((64, 64, 4, 1), (64, 32, 4, 2), (32, 32, 4, 2), (32, 64, 4, 2)),
        128: ((64, 64, 8, 1), (16, 64, 4, 1), (32, 16, 4, 1), (16, 32, 4, 1)),
    },
}
_ADA_BWD: dict[bool, _BwdTiles] = {
    False: {
        **_AMPERE_BWD[False],
        64: ((64, 64, 4, 1), (128, 64, 8, 3), (32, 64, 4, 2), (64, 32, 8, 1)),
    },
    True: _AMPERE_BWD[True],
}
_HOPPER_BWD: dict[bool, _BwdTiles] = {
    False: {
        16: ((128, 128, 8, 1), (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2)),
        32: ((128, 128, 8, 1), (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2)),
        64: ((64, 64, 4, 1), (128, 128, 8, 1), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 2)),
        128: ((64, 64, 4, 1), (128, 64, 8, 3), (32, 128, 8, 2), (64, 64, 8, 2)),
    },
    True: {
        16: ((64, 64, 4, 1), (128, 128, 8, 1), (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2)),
        32: ((64, 64, 4, 1), (128, 128, 8, 1), (64, 64, 4, 3), (32, 64, 4, 2), (64, 64, 8, 2)),
        64: ((64, 64, 4, 1), (64, 64, 4, 3), (32, 64, 4, 2), (64, 64, 4, 2)),
        128: ((64, 64, 4, 1), (128, 64, 8, 3), (16, 64, 4, 2), (64, 64, 8, 2)),
    },
}
_ATTENTION_BWD = {80: _AMPERE_BWD, 89: _ADA_BWD, 90: _HOPPER_BWD}
_FP32_BWD_PLAIN: _BwdTiles = {
    16: ((32, 32, 8, 1), (16, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    32: ((32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1), (32, 32, 4, 1)),
    64: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1), (32, 32, 8, 1)),
    128: ((16, 32, 8, 1), (16, 16, 8, 1), (32, 16, 8, 1), (32, 32, 8, 1)),
}
_FP32_BWD: dict[bool, _BwdTiles] = {
    False: _FP32_BWD_PLAIN,
    True: {
        **_FP32_BWD_PLAIN,
        128: ((16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (32, 32, 8, 1)),
    },
}
_ADA_FP32_BWD: dict[bool, _BwdTiles] = {
    **_FP32_BWD,
    True: {
        **_FP32_BWD[True],
        128: ((16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1), (16, 32, 4, 1)),
    },
}
_ATTENTION_BWD_FP32 = {80: _FP32_BWD, 89: _ADA_FP32_BWD, 90: _FP32_BWD}


@_remember
def attention_bwd_tiles(
    *,
    head_dim: int,
    dtype: torch.dtype,
    arch: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    has_bias: bool = False,
    dropout_bits: int = 0,
) -> AttentionBwdTiles:
    """The tiles of backward for sequences of at most these lengths, by `attention_bwd_bounds`.

    Dropout by 16 bits, or beside a bias, leaves no registers for the larger one of two tiles for
    whole sequences.
    """
    block_d = max(16, next_power_of_2(head_dim))
    if dtype.itemsize == 2:
        chosen = _ATTENTION_BWD[_known(arch)][has_bias][block_d]
    else:
        chosen = _ATTENTION_BWD_FP32[_known(arch)][has_bias][block_d]
    slot = f"attention backward D{block_d} {8 * dtype.itemsize} bit{' bias' if has_bias else ''}"

    def tile(part: str, m: int, n: int, warps: int, stages: int, single: bool) -> AttentionTile:
        made = AttentionTile(m, n, block_d, warps, stages, single)
        return _choose(f"{slot} {part}", arch, made)

    *wholes, dq, dkdv, bias = chosen
    scarce = dropout_bits == 16 or (dropout_bits and has_bias)
    for m, n, *launch in wholes[:1] if scarce else wholes:
        whole = tile(f"S<={m}", m, n, *launch, single=True)
        if fits := max_seqlen_q <= whole.block_m and max_seqlen_k <= whole.block_n:
            break
    return AttentionBwdTiles(
        whole,
        dq=tile("dq", *dq, single=False),
        dkdv=tile("dkdv", *dkdv, single=False),
        bias=tile("bias", *bias, single=False),
        is_whole=fits,
    )


_GEMM = {
    80: GemmTile(128, 128, 64, 8, 8, 3),
    89: GemmTile(64, 128, 64, 8, 4, 3),
    90: GemmTile(128, 128, 64, 8, 8, 3, max_registers=128),  # two programs a multiprocessor
}


def attention_bwd_tiles_of(
    part: str, arch: int, dtype: torch.dtype, head_dim: int, has_bias: bool, dropout_bits: int
) -> list[AttentionTile]:
    """Every tile of one kernel of backward that `attention_bwd_tiles` can return for these."""
    found = (
        attention_bwd_tiles(
            head_dim=head_dim, dtype=dtype, arch=arch, max_seqlen_q=n, max_seqlen_k=n,
            has_bias=has_bias, dropout_bits=dropout_bits,
        )
        for n in (1, 33, 65, 8192)
    )  # fmt: skip
    return list(dict.fromkeys(getattr(tiles, part) for tiles in found))


@_remember
def attention_bwd_bounds(
    arch: int, dtype: torch.dtype, head_dim: int, has_bias: bool, dropout_bits: int
) -> tuple[tuple[int, int], ...]:
    """How many queries and keys a sequence has at most for each tile that holds all of it."""
    tiles = attention_bwd_tiles_of("whole", arch, dtype, head_dim, has_bias, dropout_bits)
    return tuple((tile.block_m, tile.block_n) for tile in tiles)


@_remember
def gemm_tile(*, m: int, dtype: torch.dtype, arch: int) -> GemmTile:
    """The tile of the product with a fused activation."""
    if dtype.itemsize != 2:
        return _choose("linear 32 bit", arch, GemmTile(32, 32, 32, 8, 4, 2))
    if m <= 64:
        return _choose("linear 16 bit M<=64", arch, GemmTile(64, 64, 64, 8, 4, 3))
    return _choose("linear 16 bit", arch, _GEMM[_known(arch)])


def linear_route(*, m: int, n: int, k: int, dtype: torch.dtype, arch: int) -> str:
    """How a linear layer with an activation runs: ``"library"`` (cuBLAS, then one pass) or
    ``"fused"``.

    Not measured yet on any GPU, so it is the library everywhere; the sizes are what a measurement
    will decide by.
    """
    return "library"


@_remember
def layernorm_tile(width: int, arch: int) -> RowTile:
    """A program per row of a wide model, several rows of a narrow one."""
    block_n = next_power_of_2(width)
    rows = max(1, min(16, (1024 if block_n <= 512 else 2048) // block_n))
    widest = 32 if _known(arch) == 89 else 16  # where 16 spill in fp32
    num_warps = 2 if block_n <= 512 else 4 if block_n <= 2048 else 16 if block_n <= 4096 else widest
    return _choose(f"layernorm {block_n}", arch, RowTile(rows, block_n, num_warps))


@_remember
def layernorm_bwd_tile(width: int, arch: int) -> RowTile:
    """About 1024 values a step: three sums of the width of a row stay in registers too."""
    block_n = next_power_of_2(width)
    num_warps = 2 if block_n <= 1024 else 8 if block_n <= 2048 else 16
    tile = RowTile(max(1, min(8, 1024 // block_n)), block_n, num_warps)
    return _choose(f"layernorm backward {block_n}", arch, tile)


@_remember
def softmax_tile(width: int, arch: int) -> RowTile:
    """Several short rows a program, one long row."""
    block_n = max(16, next_power_of_2(width))
    rows = max(1, min(32, 2048 // block_n))
    tile = RowTile(rows, block_n, 4 if block_n <= 2048 else 8)
    return _choose(f"softmax {block_n}", arch, tile)


@_remember
def cross_entropy_tile(width: int, arch: int) -> RowTile:
    """One row a program, in strips."""
    block_n = min(4096, next_power_of_2(width))
    # Where 8 warps spill in fp32; on sm_80 only by the vocabulary of multilingual models, and 16
    # by BERT's.
    known = _known(arch)
    wide = 16 if known == 89 or (known == 80 and width > 2**16) else 8
    num_warps = wide if block_n > 1024 else 4
    return _choose(f"cross entropy {block_n}", arch, RowTile(1, block_n, num_warps))


@_remember
def bias_activation_tile(width: int, arch: int) -> RowTile:
    """A strip of one row per program; wide rows take several strips."""
    block_n = min(1024, next_power_of_2(width))
    tile = RowTile(max(1, 2048 // block_n), block_n, 4)
    return _choose(f"bias_activation {block_n}", arch, tile)
