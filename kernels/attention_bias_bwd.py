"""Bidirectional attention, backward: the gradient of an additive bias, ``ds`` of the other kernels.

A bias is mostly broadcast: relative positions have one for all sequences, ``[1, H, Sq, Sk]``. A
program has one tile of it and walks over the sequences and heads that share the tile, adding ds up
in registers, so that nothing of the size ``[B, H, Sq, Sk]`` is stored and no atomics are needed.
Broadcast rows or columns are left to the caller to add up.
"""

import torch
import triton
import triton.language as tl

from ._common import LOG2E
from ._device import input_precision
from ._dropout import dropout_keys, dropout_levels, keep_scores
from ._launch import launch
from ._tiles import AttentionTile, cdiv
from .attention import load_lse, load_rows, mask_scores, strides_of, weights

__all__ = ["attention_bias_bwd"]


@triton.jit(
    do_not_specialize=[
        "stride_lse_b", "stride_lse_h", "stride_mask_b", "num_sequences", "num_heads", "len_q",
        "len_k", "dropout_threshold",
    ]
)  # fmt: skip
def _attention_bwd_kernel_bias(
    dbias_ptr,  # [B or 1, H or 1, Sq, Sk], fp32, contiguous
    do_ptr, q_ptr, k_ptr, v_ptr,  # [B, H, S, D]
    lse_ptr, delta_ptr,  # [B, H, S], fp32
    key_mask_ptr,  # [B, Sk] or None
    bias_ptr,  # [B, H, Sq, Sk] by strides
    seed_ptr,  # [1] int64 or None
    stride_do_b, stride_do_t, stride_do_h,
    stride_q_b, stride_q_t, stride_q_h,
    stride_k_b, stride_k_t, stride_k_h,
    stride_v_b, stride_v_t, stride_v_h,
    stride_lse_b, stride_lse_h,
    stride_mask_b,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    num_sequences, num_heads, len_q, len_k,
    scale_log2, dropout_threshold, dropout_scale,
    HEAD_DIM: tl.constexpr, SUM_SEQUENCES: tl.constexpr, SUM_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DROPOUT_BITS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(len_k, BLOCK_N)
    first_m = tl.program_id(0) // tiles_n * BLOCK_M
    first_n = tl.program_id(0) % tiles_n * BLOCK_N
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    rows, columns = (first_m + offs_m)[:, None], (first_n + offs_n)[None, :]
    row, column = first_m.to(tl.int64), first_n.to(tl.int64)
    head_rows = tl.program_id(1)
    sequence_rows = tl.program_id(2)
    heads = num_heads if SUM_HEADS else 1
    count = heads * (num_sequences if SUM_SEQUENCES else 1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(count):
        sequence = (sequence_rows + i // heads).to(tl.int64)
        head = (head_rows + i % heads).to(tl.int64)
        q = load_rows(
            q_ptr + sequence * stride_q_b + row * stride_q_t + head * stride_q_h,
            offs_m,
            offs_d,
            stride_q_t,
            len_q - first_m,
            HEAD_DIM,
            BLOCK_D,
            True,
        )
        do = load_rows(
            do_ptr + sequence * stride_do_b + row * stride_do_t + head * stride_do_h,
            offs_m,
            offs_d,
            stride_do_t,
            len_q - first_m,
            HEAD_DIM,
            BLOCK_D,
            True,
        )
        k = load_rows(
            k_ptr + sequence * stride_k_b + column * stride_k_t + head * stride_k_h,
            offs_n,
            offs_d,
            stride_k_t,
            len_k - first_n,
            HEAD_DIM,
            BLOCK_D,
            True,
        )
        v = load_rows(
            v_ptr + sequence * stride_v_b + column * stride_v_t + head * stride_v_h,
            offs_n,
            offs_d,
            stride_v_t,
            len_k - first_n,
            HEAD_DIM,
            BLOCK_D,
            True,
        )
        statistics = sequence * stride_lse_b + head * stride_lse_h + row
        lse = load_lse(lse_ptr + statistics, offs_m, len_q - first_m)
        delta = tl.load(delta_ptr + statistics + offs_m, mask=offs_m < len_q - first_m, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
        masks = key_mask_ptr
        if key_mask_ptr is not None:
            masks = key_mask_ptr + sequence * stride_mask_b
        s = mask_scores(
            s, masks, bias_ptr + sequence * stride_bias_b + head * stride_bias_h, rows, columns,
            stride_bias_q, stride_bias_k, len_q, len_k, scale_log2, True,
        )  # fmt: skip
        p = weights(s, lse[:, None], scale_log2, True)
        dp = tl.dot(do, tl.trans(v), input_precision=INPUT_PRECISION)
        if DROPOUT_BITS:
            key_0, key_1 = dropout_keys(seed_ptr, sequence, head)
            keep = keep_scores(key_0, key_1, offs_m[:, None], first_m, offs_n[None, :], first_n,
                               dropout_threshold, DROPOUT_BITS)  # fmt: skip
            dp = tl.where(keep, dp * dropout_scale, 0.0)
        acc += p * (dp - delta[:, None])
    kept = sequence_rows * tl.num_programs(1) + head_rows
    out_rows = kept.to(tl.int64) * len_q + rows
    tl.store(dbias_ptr + out_rows * len_k + columns, acc, mask=(rows < len_q) & (columns < len_k))


def attention_bias_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    key_mask: torch.Tensor | None,
    bias: torch.Tensor,
    tile: AttentionTile,
    *,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient of the bias of padded attention.

    Args:
        do, q, k, v, lse, key_mask, bias, scale, dropout_p, seed: as in
            `fastbert.kernels.attention_bwd.attention_padded_bwd`.
        delta: fp32 ``[B, H, Sq]``, made by the gradients of q, k and v.
        tile: block sizes, warps and stages.

    Returns:
        fp32 ``[B or 1, H or 1, Sq, Sk]``, 1 where the bias has a stride of 0.
    """
    batch_size, num_heads, len_q, head_dim = q.shape
    len_k = k.shape[2]
    over_b, over_h = (stride == 0 for stride in bias.stride()[:2])
    kept_b, kept_h = 1 if over_b else batch_size, 1 if over_h else num_heads
    dbias = torch.empty(kept_b, kept_h, len_q, len_k, dtype=torch.float32, device=q.device)
    if dbias.numel() == 0 or q.numel() == 0:
        return dbias.zero_()
    bits, threshold, dropout_scale = dropout_levels(dropout_p, coarse=True)
    tiles = cdiv(len_q, tile.block_m) * cdiv(len_k, tile.block_n)
    launch(
        _attention_bwd_kernel_bias, (tiles, kept_h, kept_b),
        dbias, do, q, k, v, lse, delta, key_mask, bias, seed if bits else None,
        *(stride for t in (do, q, k, v) for stride in strides_of(t)),
        *lse.stride()[:2], 0 if key_mask is None else key_mask.stride(0), *bias.stride(),
        batch_size, num_heads, len_q, len_k, scale * LOG2E.value, threshold, dropout_scale,
        HEAD_DIM=head_dim, SUM_SEQUENCES=over_b, SUM_HEADS=over_h,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d,
        DROPOUT_BITS=bits, INPUT_PRECISION=input_precision(q.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return dbias
