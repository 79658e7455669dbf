"""Bidirectional attention, backward: which kernels run for gradients of q, k and v, and on what.

The kernels, and what they compute, are in `attention_bwd_kernels.py`.
"""

from collections.abc import Sequence

import torch

from ._common import LOG2E
from ._device import device_arch, input_precision
from ._dropout import dropout_levels
from ._launch import launch
from ._registers import limited
from ._tiles import AttentionBwdTiles, AttentionTile, attention_bwd_tiles, cdiv
from .attention import by_rows, for_all, strides_of
from .attention_bias_bwd import attention_bias_bwd
from .attention_bwd_kernels import (
    _attention_bwd_kernel_dkdv,
    _attention_bwd_kernel_dq,
    _attention_bwd_kernel_whole,
)

__all__ = ["attention_padded_bwd", "attention_varlen_bwd"]


def attention_varlen_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    parts: Sequence[tuple[torch.Tensor, torch.Tensor, AttentionBwdTiles]],
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    scale: float,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    bias_gradient: bool = False,
) -> torch.Tensor | None:
    """Gradients of packed attention, written into ``gradients``.

    Args:
        do, out: ``[Tq, H, D]``; q, k, v: as in forward; the last stride of each 1.
        lse: fp32 ``[H, Tq]`` from forward.
        cu_seqlens_q, cu_seqlens_k: int32 ``[B + 1]``.
        parts: for each class of sequences, whose lengths
            `fastbert.kernels._tiles.attention_bwd_bounds` has: tile maps, int32 ``[tiles, 2]``, of
            the queries for ``tiles.dq.block_m`` and of the keys for ``tiles.dkdv.block_n``, and the
            tiles from `fastbert.kernels._tiles.attention_bwd_tiles`. Where ``tiles.is_whole`` the
            first map has one tile for each sequence and the second is not read.
        gradients: dq, dk, dv like q, k, v, any strides, the last 1.
        scale, dropout_p, seed, bias: as in forward.
        bias_gradient: whether the gradient of the bias is wanted; keys are those of the queries.

    Returns:
        The gradient of the bias, fp32 ``[H, S, S]``, if it is wanted.
    """
    pairs, bias = _pairs_for(lse), for_all(bias)
    common = _Common(do, out, q, k, v, lse, pairs, None, bias, seed, gradients, scale, dropout_p)
    for tile_map_q, tile_map_k, tiles in parts:
        if tiles.is_whole:
            launches = ((common.launch_whole, tiles.whole, tile_map_q),)
        else:  # the first one makes pairs for the second
            launches = (
                (common.launch_dq, tiles.dq, tile_map_q),
                (common.launch_dkdv, tiles.dkdv, tile_map_k),
            )
        for run, tile, tile_map in launches:
            grid = (tile_map.shape[0], q.shape[1])
            if all(grid):
                run(tile, (cu_seqlens_q, cu_seqlens_k, tile_map), grid, 1, 0, 0)
    if not bias_gradient:
        return None
    dbias = attention_bias_bwd(
        do, q, k, v, pairs, None, bias, parts[0][2].bias, scale=scale, dropout_p=dropout_p,
        seed=seed, cu_seqlens=cu_seqlens_q,
    )  # fmt: skip
    return dbias[0]


def attention_padded_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    key_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    scale: float,
    bias_gradient: bool = False,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of padded attention.

    Args:
        do, out: ``[B, H, Sq, D]``; q, k, v, key_mask, bias: as in forward.
        lse: fp32 ``[B, H, Sq]`` from forward.
        bias_gradient: whether the gradient of the bias is wanted.
        scale, dropout_p, seed: as in forward.

    Returns:
        dq, dk, dv like q, k, v, as views of ``[B, S, H, D]``; the gradient of the bias or None,
        fp32 ``[B or 1, H or 1, Sq, Sk]``, 1 where the bias is broadcast.
    """
    batch_size, num_heads, len_q, head_dim = q.shape
    len_k = k.shape[2]
    sizes = (len_q, len_k, len_k)
    gradients = tuple(
        q.new_empty(batch_size, length, num_heads, head_dim).transpose(1, 2) for length in sizes
    )
    key_mask = None if key_mask is None else key_mask.contiguous()
    pairs, bias = _pairs_for(lse), by_rows(bias)
    common = _Common(
        do, out, q, k, v, lse, pairs, key_mask, bias, seed, gradients, scale, dropout_p
    )
    tiles = attention_bwd_tiles(
        head_dim=head_dim, dtype=q.dtype, arch=device_arch(q.device),
        max_seqlen_q=len_q, max_seqlen_k=len_k, has_bias=bias is not None,
        dropout_bits=common.constants["DROPOUT_BITS"],
    )  # fmt: skip
    if tiles.is_whole:
        launches = ((common.launch_whole, tiles.whole, 1),)
    else:
        launches = (
            (common.launch_dq, tiles.dq, cdiv(len_q, tiles.dq.block_m)),
            (common.launch_dkdv, tiles.dkdv, cdiv(len_k, tiles.dkdv.block_n)),
        )
    for run, tile, count in launches if q.numel() else ():
        run(tile, (None,) * 3, (batch_size * count, num_heads), count, len_q, len_k)
    if not bias_gradient:
        return *gradients, None
    dbias = attention_bias_bwd(
        do, q, k, v, pairs, key_mask, bias, tiles.bias, scale=scale, dropout_p=dropout_p,
        seed=seed,
    )  # fmt: skip
    return *gradients, dbias


def _pairs_for(lse: torch.Tensor) -> torch.Tensor:
    """Where log-sum-exp and delta of each row lie next to each other, by lse's strides."""
    assert lse.is_contiguous(), "the log-sum-exp is as forward made it"
    return lse.new_empty(*lse.shape, 2)


class _Common:
    """What the launches of one backward pass share."""

    def __init__(
        self, do, out, q, k, v, lse, pairs, key_mask, bias, seed, gradients, scale, dropout_p
    ):
        assert scale > 0, "the scale is positive, as in forward"
        rows = (do, q, k, v, out, *gradients)
        assert all(t.stride(-1) == 1 for t in rows), "heads must be contiguous"
        bits, threshold, dropout_scale = dropout_levels(dropout_p, coarse=True)
        self.do, self.out, self.q, self.k, self.v = do, out, q, k, v
        self.lse, self.pairs, self.key_mask, self.bias = lse, pairs, key_mask, bias
        self.dq, self.dk, self.dv = gradients
        self.seed = seed if bits else None
        self.masks = (key_mask, bias, self.seed)
        self.mask_strides = (
            *(0, *lse.stride())[-3:-1],
            0 if key_mask is None else key_mask.stride(0),
            *((0, 0, 0) if bias is None else bias.stride()[:3]),
        )
        self.scale_log2 = scale * LOG2E.value
        self.scalars = (float(scale), self.scale_log2, threshold, dropout_scale)
        self.reload = q.dtype == torch.float32  # fp32 operands would stay in registers
        self.constants = {
            "HEAD_DIM": q.shape[-1],
            "DROPOUT_BITS": bits,
            "INPUT_PRECISION": input_precision(q.dtype),
        }

    def _launch(self, kernel, grid, tile: AttentionTile, *args, **constants) -> None:
        bits, precision = self.constants["DROPOUT_BITS"], self.constants["INPUT_PRECISION"]
        tile = limited(tile, kernel, self.q, self.key_mask, self.bias, bits, precision)
        launch(
            kernel, grid, *args, **self.constants, **constants,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d,
            num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.max_registers,
        )  # fmt: skip

    def launch_dq(self, tile, maps, grid, *sizes) -> None:
        rows = (self.do, self.out, self.q, self.k, self.v)
        strides = [s for t in (self.dq, *rows) for s in strides_of(t)]
        self._launch(
            _attention_bwd_kernel_dq, grid, tile, self.dq, self.pairs, *rows, self.lse,
            *self.masks, *maps, *strides, *self.mask_strides, *sizes, *self.scalars,
            RELOAD=self.reload,
        )  # fmt: skip

    def launch_dkdv(self, tile, maps, grid, *sizes) -> None:
        rows = (self.dk, self.dv, self.do, self.q, self.k, self.v)
        strides = [s for t in rows for s in strides_of(t)]
        self._launch(
            _attention_bwd_kernel_dkdv, grid, tile, *rows, self.pairs, *self.masks,
            *maps, *strides, *self.mask_strides, *sizes, *self.scalars, RELOAD=self.reload,
        )  # fmt: skip

    def launch_whole(self, tile, maps, grid, _, *sizes) -> None:
        """A sequence is one tile, so their number is not asked for."""
        gradients = (self.dq, self.dk, self.dv)
        rows = (self.do, self.out, self.q, self.k, self.v)
        strides = [s for t in (*gradients, *rows) for s in strides_of(t)]
        self._launch(
            _attention_bwd_kernel_whole, grid, tile, *gradients, self.pairs, *rows, self.lse,
            *self.masks, *maps, *strides, *self.mask_strides, *sizes, *self.scalars,
        )  # fmt: skip
