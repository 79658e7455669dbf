"""Attention by the kernels: their registration as ops, and which tiles they get.

What `fastbert.ops.attention` and the functions of whole layers launch; nothing is validated here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..packing import LengthClass, PackedBatch
from .registry import define

if TYPE_CHECKING:
    from ..kernels._tiles import AttentionBwdTiles, AttentionTile

__all__ = [
    "MAX_DROPOUT_LENGTH", "MAX_HEAD_SIZE", "attention_padded", "attention_padded_bwd",
    "parts_of", "run_varlen", "run_varlen_bwd",
]  # fmt: skip

MAX_HEAD_SIZE = 128
MAX_DROPOUT_LENGTH = 65536  # two positions share the 32 bits that a mask is made of


def _launch_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    tile_maps: Sequence[Tensor],
    longest_q: Sequence[int],
    longest_k: Sequence[int],
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    bias: Tensor | None,
    keep_lse: bool,
) -> tuple[Tensor, Tensor]:
    from ..kernels.attention import attention_varlen_fwd

    lengths = zip(longest_q, longest_k, strict=True)
    tiles = [_tile_for(q, *longest, bias is not None) for longest in lengths]
    out, lse = attention_varlen_fwd(
        q, k, v, cu_seqlens_q, cu_seqlens_k, list(zip(tile_maps, tiles, strict=True)), scale=scale,
        dropout_p=dropout_p, seed=seed, bias=bias, keep_lse=keep_lse,
    )  # fmt: skip
    return out, lse if keep_lse else q.new_empty(0, dtype=torch.float32)


def _launch_varlen_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    tile_maps_q: Sequence[Tensor],
    tile_maps_k: Sequence[Tensor],
    longest_q: Sequence[int],
    longest_k: Sequence[int],
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    fused: bool,
    bias: Tensor | None,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels.attention_bwd import attention_varlen_bwd

    results = _varlen_gradients(q, k, fused)
    lengths = zip(longest_q, longest_k, strict=True)
    tiles = [_bwd_tiles(q, *longest, dropout_p, bias is not None) for longest in lengths]
    dbias = attention_varlen_bwd(
        do, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k,
        list(zip(tile_maps_q, tile_maps_k, tiles, strict=True)),
        results[0].unbind(1) if fused else results,
        scale=scale, dropout_p=dropout_p, seed=seed, bias=bias, bias_gradient=bias_gradient,
    )  # fmt: skip
    return *results, q.new_empty(0) if dbias is None else dbias


def _varlen_gradients(q: Tensor, k: Tensor, fused: bool) -> tuple[Tensor, ...]:
    """Memory for dq, dk and dv: in one ``[T, 3, H, D]`` if the projection was one."""
    if fused:
        return q.new_empty(q.shape[0], 3, *q.shape[1:]), q.new_empty(0), q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)


def _varlen_bwd_shapes(do, q, k, *rest):
    *_, fused, bias, bias_gradient = rest
    dbias = bias.new_empty(bias.shape, dtype=torch.float32) if bias_gradient else q.new_empty(0)
    return *_varlen_gradients(q, k, fused), dbias


def _launch_padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    keep_lse: bool,
) -> tuple[Tensor, Tensor]:
    from ..kernels.attention import attention_padded_fwd

    out, lse = attention_padded_fwd(
        q, k, v, key_mask, bias, scale=scale, dropout_p=dropout_p, seed=seed, keep_lse=keep_lse
    )
    return out, lse if keep_lse else q.new_empty(0, dtype=torch.float32)


def _launch_padded_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels.attention_bwd import attention_padded_bwd

    *gradients, dbias = attention_padded_bwd(
        do, q, k, v, out, lse, key_mask, bias, scale=scale, bias_gradient=bias_gradient,
        dropout_p=dropout_p, seed=seed,
    )  # fmt: skip
    return *gradients, q.new_empty(0) if dbias is None else dbias


def _padded_bwd_shapes(do, q, k, v, out, lse, key_mask, bias, scale, p, seed, bias_gradient):
    def like(t: Tensor) -> Tensor:
        b, h, s, d = t.shape
        return t.new_empty(b, s, h, d).transpose(1, 2)

    dbias = q.new_empty(0)
    if bias_gradient:
        kept = [1 if bias.stride(i) == 0 else bias.shape[i] for i in (0, 1)]
        dbias = bias.new_empty(*kept, *bias.shape[2:], dtype=torch.float32)
    return like(q), like(k), like(v), dbias


def _tile_for(q: Tensor, max_seqlen_q: int, max_seqlen_k: int, has_bias: bool) -> AttentionTile:
    from ..kernels._device import device_arch
    from ..kernels._tiles import attention_tile

    return attention_tile(
        head_dim=q.shape[-1],
        dtype=q.dtype,
        arch=device_arch(q.device),
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        has_bias=has_bias,
    )


def _bwd_tiles(
    q: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, has_bias: bool
) -> AttentionBwdTiles:
    from ..kernels._device import device_arch
    from ..kernels._dropout import dropout_levels
    from ..kernels._tiles import attention_bwd_tiles

    return attention_bwd_tiles(
        head_dim=q.shape[-1],
        dtype=q.dtype,
        arch=device_arch(q.device),
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        has_bias=has_bias,
        dropout_bits=dropout_levels(dropout_p, coarse=True)[0],
    )


def _classes(
    q: Tensor, batch: PackedBatch, keys: PackedBatch, has_bias: bool
) -> tuple[LengthClass, ...]:
    from ..kernels._device import device_arch
    from ..kernels._tiles import attention_bounds

    bounds = attention_bounds(device_arch(q.device), q.dtype, q.shape[-1], has_bias)
    return batch.classes(bounds, keys)


def _bwd_classes(
    q: Tensor, batch: PackedBatch, keys: PackedBatch, dropout_p: float, has_bias: bool
) -> tuple[LengthClass, ...]:
    from ..kernels._device import device_arch
    from ..kernels._dropout import dropout_levels
    from ..kernels._tiles import attention_bwd_bounds

    bits = dropout_levels(dropout_p, coarse=True)[0]
    arch = device_arch(q.device)
    return batch.classes(attention_bwd_bounds(arch, q.dtype, q.shape[-1], has_bias, bits), keys)


def parts_of(
    q: Tensor, batch: PackedBatch, keys: PackedBatch, has_bias: bool
) -> list[tuple[LengthClass, AttentionTile]]:
    """What is launched for packed attention: the classes of sequences, each with its tile."""
    return [
        (each, _tile_for(q, each.max_seqlen_q, each.max_seqlen_k, has_bias))
        for each in _classes(q, batch, keys, has_bias)
    ]


_DROPOUT = "float dropout_p, Tensor? seed"
_attention_varlen = define(
    "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    f"Tensor[] tile_maps, int[] longest_q, int[] longest_k, float scale, {_DROPOUT}, "
    "Tensor? bias, bool keep_lse) -> (Tensor, Tensor)",
    _launch_varlen,
    lambda q, *rest: (
        q.new_empty(q.shape),
        q.new_empty((q.shape[1], q.shape[0]) if rest[-1] else 0, dtype=torch.float32),
    ),
)
_attention_varlen_bwd = define(
    "attention_varlen_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor[] tile_maps_q, Tensor[] tile_maps_k, "
    f"int[] longest_q, int[] longest_k, float scale, {_DROPOUT}, bool fused, "
    "Tensor? bias, bool bias_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_varlen_bwd,
    _varlen_bwd_shapes,
)
attention_padded = define(
    "attention_padded(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? bias, "
    f"float scale, {_DROPOUT}, bool keep_lse) -> (Tensor, Tensor)",
    _launch_padded,
    lambda q, *rest: (
        q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2),
        q.new_empty(q.shape[:3] if rest[-1] else 0, dtype=torch.float32),
    ),
)
attention_padded_bwd = define(
    "attention_padded_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"Tensor? key_mask, Tensor? bias, float scale, {_DROPOUT}, bool bias_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _launch_padded_bwd,
    _padded_bwd_shapes,
)


def run_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: PackedBatch,
    keys: PackedBatch,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    bias: Tensor | None = None,
    keep_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Packed attention by the kernel: its result and the log-sum-exp that backward needs, or
    nothing in its place."""
    parts = parts_of(q, batch, keys, bias is not None)
    return _attention_varlen(
        q, k, v, batch.cu_seqlens, keys.cu_seqlens,
        tuple([each.tile_map(tile.block_m) for each, tile in parts]),
        tuple([each.max_seqlen_q for each, _ in parts]),
        tuple([each.max_seqlen_k for each, _ in parts]), scale, dropout_p, seed, bias, keep_lse,
    )  # fmt: skip


def run_varlen_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    batch: PackedBatch,
    keys: PackedBatch,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    fused: bool,
    bias: Tensor | None = None,
    bias_gradient: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, and of the bias if it is wanted; with ``fused`` the first one is all
    three, ``[T, 3, H, D]``."""
    maps_q, maps_k, longest_q, longest_k = [], [], [], []
    for each in _bwd_classes(q, batch, keys, dropout_p, bias is not None):
        longest = each.max_seqlen_q, each.max_seqlen_k
        tiles = _bwd_tiles(q, *longest, dropout_p, bias is not None)
        whole = tiles.is_whole
        maps_q.append(each.tile_map(None if whole else tiles.dq.block_m))
        maps_k.append(maps_q[-1] if whole else each.tile_map(tiles.dkdv.block_n, of_keys=True))
        longest_q.append(longest[0])
        longest_k.append(longest[1])
    return _attention_varlen_bwd(
        do, q, k, v, out, lse, batch.cu_seqlens, keys.cu_seqlens, tuple(maps_q), tuple(maps_k),
        tuple(longest_q), tuple(longest_k), scale, dropout_p, seed, fused, bias, bias_gradient,
    )  # fmt: skip
