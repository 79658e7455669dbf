"""Bidirectional attention, backward: the gradient of an additive bias, ``ds`` of the other kernels.

A bias is mostly broadcast: relative positions have one for all sequences, ``[1, H, Sq, Sk]``, and
packed sequences, of any lengths, have no other. A program has one tile of it and walks over the
sequences and heads that share the tile, adding ds up in registers, so that nothing of the size
``[B, H, Sq, Sk]`` is stored and no atomics are needed. Broadcast rows or columns are left to the
caller to add up.
"""

import torch
import triton
import triton.language as tl

from ._common import LOG2E
from ._device import input_precision
from ._dropout import dropout_keys, dropout_levels, keep_scores
from ._launch import launch
from ._registers import limited
from ._tiles import AttentionTile, cdiv
from .attention import load_rows, masked_product, strides_of, weights
from .attention_bwd_kernels import load_pairs

__all__ = ["attention_bias_bwd"]


@triton.jit
def _tile_of_one(do_ptr, q_ptr, k_ptr, v_ptr, pairs_ptr, key_mask_ptr, bias_ptr, offs_m,
                 offs_n, offs_d, first_m, first_n, stride_do_t, stride_q_t, stride_k_t, stride_v_t,
                 stride_bias_q, len_q, len_k, scale_log2, key_0, key_1, dropout_threshold,
                 HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DROPOUT_BITS: tl.constexpr,
                 INPUT_PRECISION: tl.constexpr):  # fmt: skip
    """ds of one sequence and head, [BLOCK_M, BLOCK_N], without the scale of dropout.

    Pointers of rows and statistics are at the tile's first query and key, those of mask and bias at
    the sequence's.
    """
    rest_q, rest_k = len_q - first_m, len_k - first_n
    q = load_rows(q_ptr, offs_m, offs_d, stride_q_t, rest_q, HEAD_DIM, BLOCK_D, True)
    do = load_rows(do_ptr, offs_m, offs_d, stride_do_t, rest_q, HEAD_DIM, BLOCK_D, True)
    k = load_rows(k_ptr, offs_n, offs_d, stride_k_t, rest_k, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_ptr, offs_n, offs_d, stride_v_t, rest_k, HEAD_DIM, BLOCK_D, True)
    lse, delta = load_pairs(pairs_ptr, offs_m, rest_q)
    s = masked_product(q, k, key_mask_ptr, bias_ptr, (first_m + offs_m)[:, None],
                       (first_n + offs_n)[None, :], stride_bias_q, len_q, len_k, scale_log2,
                       True, INPUT_PRECISION)  # fmt: skip
    p = weights(s, lse[:, None], scale_log2)
    dp = tl.dot(do, tl.trans(v), input_precision=INPUT_PRECISION)
    if DROPOUT_BITS:
        keep = keep_scores(key_0, key_1, offs_m[:, None], first_m, offs_n[None, :], first_n,
                           dropout_threshold, DROPOUT_BITS)  # fmt: skip
        dp = tl.where(keep, dp, 0.0)
    return p * (dp - delta[:, None])


@triton.jit(
    do_not_specialize=[
        "stride_pairs_b", "stride_pairs_h", "stride_mask_b", "num_sequences", "num_heads", "len_q",
        "len_k", "dropout_threshold",
    ]
)  # fmt: skip
def _attention_bwd_kernel_bias(
    dbias_ptr,  # [B or 1, H or 1, Sq, Sk], fp32, contiguous
    do_ptr, q_ptr, k_ptr, v_ptr,  # [T, H, D] or [B, H, S, D]
    pairs_ptr,  # [H, T, 2] or [B, H, S, 2], fp32: lse and delta
    key_mask_ptr,  # [B, Sk] or None
    bias_ptr,  # [B, H, Sq, Sk], the last stride 1
    seed_ptr,  # [1] int64 or None
    cu_seqlens_q_ptr,  # [B + 1], of keys as well, or None
    stride_do_b, stride_do_t, stride_do_h,
    stride_q_b, stride_q_t, stride_q_h,
    stride_k_b, stride_k_t, stride_k_h,
    stride_v_b, stride_v_t, stride_v_h,
    stride_pairs_b, stride_pairs_h,
    stride_mask_b,
    stride_bias_b, stride_bias_h, stride_bias_q,
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
    head_rows = tl.program_id(1)
    sequence_rows = tl.program_id(2)
    heads = num_heads if SUM_HEADS else 1
    count = heads * (num_sequences if SUM_SEQUENCES else 1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(count):
        sequence = (sequence_rows + i // heads).to(tl.int64)
        head = (head_rows + i % heads).to(tl.int64)
        if cu_seqlens_q_ptr is not None:
            start = tl.load(cu_seqlens_q_ptr + sequence)
            seq_q = tl.load(cu_seqlens_q_ptr + sequence + 1) - start
            seq_k = seq_q
            row, column = (start + first_m).to(tl.int64), (start + first_n).to(tl.int64)
            reaches = seq_q > tl.maximum(first_m, first_n)
        else:
            reaches: tl.constexpr = True
            seq_q, seq_k = len_q, len_k
            row, column = first_m.to(tl.int64), first_n.to(tl.int64)
        if reaches:
            masks = key_mask_ptr
            if key_mask_ptr is not None:
                masks = key_mask_ptr + sequence * stride_mask_b
            pairs = sequence * stride_pairs_b + head * stride_pairs_h + 2 * row
            key_0, key_1 = 0, 0
            if DROPOUT_BITS:
                key_0, key_1 = dropout_keys(seed_ptr, sequence, head)
            acc += _tile_of_one(
                do_ptr + sequence * stride_do_b + row * stride_do_t + head * stride_do_h,
                q_ptr + sequence * stride_q_b + row * stride_q_t + head * stride_q_h,
                k_ptr + sequence * stride_k_b + column * stride_k_t + head * stride_k_h,
                v_ptr + sequence * stride_v_b + column * stride_v_t + head * stride_v_h,
                pairs_ptr + pairs, masks,
                bias_ptr + sequence * stride_bias_b + head * stride_bias_h,
                offs_m, offs_n, offs_d, first_m, first_n,
                stride_do_t, stride_q_t, stride_k_t, stride_v_t, stride_bias_q, seq_q, seq_k,
                scale_log2, key_0, key_1, dropout_threshold,
                HEAD_DIM, BLOCK_D, DROPOUT_BITS, INPUT_PRECISION,
            )  # fmt: skip
    if DROPOUT_BITS:
        acc *= dropout_scale
    kept = sequence_rows * tl.num_programs(1) + head_rows
    out_rows = kept.to(tl.int64) * len_q + rows
    tl.store(dbias_ptr + out_rows * len_k + columns, acc, mask=(rows < len_q) & (columns < len_k))


def attention_bias_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pairs: torch.Tensor,
    key_mask: torch.Tensor | None,
    bias: torch.Tensor,
    tile: AttentionTile,
    *,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of the bias of padded attention, or of one that packed sequences share.

    Args:
        do, q, k, v, key_mask, bias, scale, dropout_p, seed: as in
            `fastbert.kernels.attention_bwd.attention_padded_bwd`.
        pairs: fp32 ``[H, T, 2]`` or ``[B, H, Sq, 2]``, log-sum-exp and delta of each row, made by
            the gradients of q, k and v.
        tile: block sizes, warps and stages.
        cu_seqlens: int32 ``[B + 1]`` for packed sequences, whose rows are as in
            `fastbert.kernels.attention_bwd.attention_varlen_bwd`; the bias has a stride of 0 there.

    Returns:
        fp32 ``[B or 1, H or 1, Sq, Sk]``, 1 where the bias has a stride of 0; for packed sequences
        ``[1, H, S, S]``.
    """
    *_, num_heads, len_q, len_k = bias.shape
    batch_size = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    head_dim = q.shape[-1]
    over_b, over_h = (stride == 0 for stride in bias.stride()[:2])
    over_h = over_h and cu_seqlens is None
    kept_b, kept_h = 1 if over_b else batch_size, 1 if over_h else num_heads
    dbias = torch.empty(kept_b, kept_h, len_q, len_k, dtype=torch.float32, device=q.device)
    if dbias.numel() == 0 or q.numel() == 0:
        return dbias.zero_()
    bits, threshold, dropout_scale = dropout_levels(dropout_p, coarse=True)
    precision = input_precision(q.dtype)
    tile = limited(tile, _attention_bwd_kernel_bias, q, key_mask, bias, bits, precision)
    tiles = cdiv(len_q, tile.block_m) * cdiv(len_k, tile.block_n)
    launch(
        _attention_bwd_kernel_bias, (tiles, kept_h, kept_b),
        dbias, do, q, k, v, pairs, key_mask, bias, seed if bits else None,
        cu_seqlens, *(stride for t in (do, q, k, v) for stride in strides_of(t)),
        *(0, *pairs.stride())[-4:-2], 0 if key_mask is None else key_mask.stride(0),
        *bias.stride()[:3],
        batch_size, num_heads, len_q, len_k, scale * LOG2E.value, threshold, dropout_scale,
        HEAD_DIM=head_dim, SUM_SEQUENCES=over_b, SUM_HEADS=over_h,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d,
        DROPOUT_BITS=bits, INPUT_PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.max_registers,
    )  # fmt: skip
    return dbias
