"""Bidirectional attention, backward: the kernels for gradients of q, k and v.

With ``p = softmax(q k^T * scale + bias)``, ``z`` the factors of dropout, ``out = (p z) v`` and
``delta = sum(do * out)`` by row (Dao et al., 2205.14135, appendix B):

    dv = (p z)^T do        ds = p z (do v^T) - p delta
    dq = ds k * scale      dk = ds^T q * scale

z is 0 or the scale of dropout, by which the sums are multiplied at the end and delta is divided.

p is rebuilt from the scores and the log-sum-exp that forward kept, so that its relative error is a
rounding of the latter; nothing of the size of the scores is in memory. Three kernels, no atomics,
so that two runs give the same bits:

- ``dq``: a tile of queries stays, keys pass by. It also makes delta, and lays it beside the
  log-sum-exp for the next one.
- ``dkdv``: a tile of keys stays, queries pass by. Its scores are transposed, ``[BLOCK_N,
  BLOCK_M]``, so that p and ds are left operands of their products as they come.
- ``whole``: where a sequence fits one tile, everything in one program and five products instead of
  seven.

`attention_bwd.py` launches them; `attention_bias_bwd.py` has a fourth, for the gradient of a bias.

A query without keys has a log-sum-exp of -inf; taken as +inf it gives p = 0, as do queries past the
end of their sequence. Keys past the end only matter where they are summed over, in ``dq``.
"""

import triton
import triton.language as tl

from ._dropout import dropout_keys, keep_scores
from .attention import load_lse, load_rows, locate, masked_product, weights

__all__ = [
    "_attention_bwd_kernel_dkdv", "_attention_bwd_kernel_dq", "_attention_bwd_kernel_whole",
    "load_pairs",
]  # fmt: skip


@triton.jit
def _row_sums(do, out_ptr, offs_m, offs_d, stride_out_t, length, dropout_scale,
              HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
              DROPOUT_BITS: tl.constexpr):  # fmt: skip
    """delta, [BLOCK_M]."""
    out = load_rows(out_ptr, offs_m, offs_d, stride_out_t, length, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if DROPOUT_BITS:  # a scale of 0 drops everything, and delta is 0
        delta /= tl.where(dropout_scale == 0.0, 1.0, dropout_scale)
    return delta


@triton.jit
def _store_pairs(ptr, lse, delta, offs_m, length):
    """lse and delta of rows next to each other, as `load_pairs` takes them."""
    ptrs = ptr + 2 * offs_m[:, None] + tl.arange(0, 2)[None, :]
    tl.store(ptrs, tl.join(lse, delta), mask=(offs_m < length)[:, None])


@triton.jit
def load_pairs(ptr, offs_m, length):
    """The log-sum-exp of rows, +inf where there is no row or key, and delta.

    Every thread loads those of the rows whose scores it has, so two at a time are half the loads.
    """
    inside = offs_m < length
    ptrs = ptr + 2 * offs_m[:, None] + tl.arange(0, 2)[None, :]
    lse, delta = tl.split(tl.load(ptrs, mask=inside[:, None], other=0.0))
    return tl.where(inside, lse, float("inf")), delta


@triton.jit
def _store_rows(ptr, values, offs_r, offs_d, stride_r, length, HEAD_DIM: tl.constexpr):
    ptrs = ptr + offs_r.to(tl.int64)[:, None] * stride_r + offs_d[None, :]
    mask = (offs_r < length)[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptrs, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dq_step(acc, q, do, lse, delta, k_ptr, v_ptr, key_mask_ptr, bias_ptr, offs_m, offs_n, offs_d,
             stride_k_t, stride_v_t, stride_bias_q, len_q, len_k, scale_log2, key_0, key_1, first_m,
             first_n, dropout_threshold,
             HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_KEYS: tl.constexpr,
             DROPOUT_BITS: tl.constexpr, INPUT_PRECISION: tl.constexpr):  # fmt: skip
    """Adds one tile of keys to dq, which still lacks the scale of dropout."""
    k = load_rows(k_ptr, offs_n, offs_d, stride_k_t, len_k, HEAD_DIM, BLOCK_D, CHECK_KEYS)
    v = load_rows(v_ptr, offs_n, offs_d, stride_v_t, len_k, HEAD_DIM, BLOCK_D, CHECK_KEYS)
    s = masked_product(q, k, key_mask_ptr, bias_ptr, offs_m[:, None], offs_n[None, :],
                       stride_bias_q, len_q, len_k, scale_log2, CHECK_KEYS,
                       INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]  # fmt: skip
    p = weights(s, lse[:, None], scale_log2)
    dp = tl.dot(do, tl.trans(v), input_precision=INPUT_PRECISION)
    if DROPOUT_BITS:
        keep = keep_scores(key_0, key_1, offs_m[:, None], first_m, offs_n[None, :], first_n,
                           dropout_threshold, DROPOUT_BITS)  # fmt: skip
        dp = tl.where(keep, dp, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision=INPUT_PRECISION)


@triton.jit(
    do_not_specialize=[
        "stride_lse_b", "stride_lse_h", "stride_mask_b", "tiles_per_sequence", "len_q", "len_k",
        "dropout_threshold",
    ]
)  # fmt: skip
def _attention_bwd_kernel_dq(
    dq_ptr,  # [T, H, D] or [B, H, S, D], as everything else
    pairs_ptr,  # [H, T, 2] or [B, H, S, 2], fp32: lse and delta
    do_ptr, out_ptr, q_ptr, k_ptr, v_ptr,
    lse_ptr,  # [H, T] or [B, H, S], fp32, log2 units
    key_mask_ptr,  # [B, Sk] or None
    bias_ptr,  # [B, H, Sq, Sk], the last stride 1, or None
    seed_ptr,  # [1] int64 or None
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, tile_map_ptr,  # or None
    stride_dq_b, stride_dq_t, stride_dq_h,
    stride_do_b, stride_do_t, stride_do_h,
    stride_out_b, stride_out_t, stride_out_h,
    stride_q_b, stride_q_t, stride_q_h,
    stride_k_b, stride_k_t, stride_k_h,
    stride_v_b, stride_v_t, stride_v_h,
    stride_lse_b, stride_lse_h,
    stride_mask_b,
    stride_bias_b, stride_bias_h, stride_bias_q,
    tiles_per_sequence, len_q, len_k,
    scale, scale_log2, dropout_threshold, dropout_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    RELOAD: tl.constexpr, DROPOUT_BITS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, tile, q_start, k_start, seq_q, seq_k = locate(
        tile_map_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, tiles_per_sequence, len_q, len_k
    )
    head = tl.program_id(1).to(tl.int64)
    first_m = tile * BLOCK_M
    row = q_start + first_m
    seq_q -= first_m  # rows from this tile on; pointers move to its first one
    q_ptr += sequence * stride_q_b + row * stride_q_t + head * stride_q_h
    k_ptr += sequence * stride_k_b + k_start * stride_k_t + head * stride_k_h
    v_ptr += sequence * stride_v_b + k_start * stride_v_t + head * stride_v_h
    do_ptr += sequence * stride_do_b + row * stride_do_t + head * stride_do_h
    out_ptr += sequence * stride_out_b + row * stride_out_t + head * stride_out_h
    dq_ptr += sequence * stride_dq_b + row * stride_dq_t + head * stride_dq_h
    statistics = sequence * stride_lse_b + head * stride_lse_h + row
    if key_mask_ptr is not None:
        key_mask_ptr += sequence * stride_mask_b
    if bias_ptr is not None:
        bias_ptr += (
            sequence * stride_bias_b + head * stride_bias_h + first_m.to(tl.int64) * stride_bias_q
        )
    key_0, key_1 = 0, 0
    if DROPOUT_BITS:
        key_0, key_1 = dropout_keys(seed_ptr, sequence, head)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    q = load_rows(q_ptr, offs_m, offs_d, stride_q_t, seq_q, HEAD_DIM, BLOCK_D, True)
    do = load_rows(do_ptr, offs_m, offs_d, stride_do_t, seq_q, HEAD_DIM, BLOCK_D, True)
    delta = _row_sums(do, out_ptr, offs_m, offs_d, stride_out_t, seq_q, dropout_scale, HEAD_DIM,
                      BLOCK_D, DROPOUT_BITS)  # fmt: skip
    lse = load_lse(lse_ptr + statistics, offs_m, seq_q)
    _store_pairs(pairs_ptr + 2 * statistics, lse, delta, offs_m, seq_q)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    step = tl.full([], BLOCK_N, tl.int64)
    for i in range(seq_k // BLOCK_N):
        if RELOAD:
            q = load_rows(q_ptr, offs_m, offs_d, stride_q_t, seq_q, HEAD_DIM, BLOCK_D, True)
            do = load_rows(do_ptr, offs_m, offs_d, stride_do_t, seq_q, HEAD_DIM, BLOCK_D, True)
        acc = _dq_step(
            acc, q, do, lse, delta, k_ptr, v_ptr, key_mask_ptr, bias_ptr, offs_m, offs_n, offs_d,
            stride_k_t, stride_v_t, stride_bias_q, seq_q, BLOCK_N, scale_log2, key_0, key_1,
            first_m, i * BLOCK_N, dropout_threshold,
            HEAD_DIM, BLOCK_D, False, DROPOUT_BITS, INPUT_PRECISION,
        )  # fmt: skip
        k_ptr += step * stride_k_t
        v_ptr += step * stride_v_t
        if key_mask_ptr is not None:
            key_mask_ptr += BLOCK_N
        if bias_ptr is not None:
            bias_ptr += BLOCK_N
    rest = seq_k % BLOCK_N
    if rest > 0:
        acc = _dq_step(
            acc, q, do, lse, delta, k_ptr, v_ptr, key_mask_ptr, bias_ptr, offs_m, offs_n, offs_d,
            stride_k_t, stride_v_t, stride_bias_q, seq_q, rest, scale_log2, key_0, key_1,
            first_m, seq_k - rest, dropout_threshold,
            HEAD_DIM, BLOCK_D, True, DROPOUT_BITS, INPUT_PRECISION,
        )  # fmt: skip
    if DROPOUT_BITS:
        scale *= dropout_scale
    _store_rows(dq_ptr, acc * scale, offs_m, offs_d, stride_dq_t, seq_q, HEAD_DIM)


@triton.jit
def _dkdv_step(acc_dk, acc_dv, k, v, q_ptr, do_ptr, pairs_ptr, key_mask_ptr, bias_ptr,
               offs_m, offs_n, offs_d, stride_q_t, stride_do_t, stride_bias_q, len_q, len_k,
               scale_log2, key_0, key_1, first_m, first_n, dropout_threshold, nothing,
               HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
               CHECK_ROWS: tl.constexpr, DROPOUT_BITS: tl.constexpr,
               INPUT_PRECISION: tl.constexpr):  # fmt: skip
    """Adds one tile of queries to dk and dv, which still lack the scale of dropout."""
    q = load_rows(q_ptr, offs_m, offs_d, stride_q_t, len_q, HEAD_DIM, BLOCK_D, CHECK_ROWS)
    do = load_rows(do_ptr, offs_m, offs_d, stride_do_t, len_q, HEAD_DIM, BLOCK_D, CHECK_ROWS)
    lse, delta = load_pairs(pairs_ptr, offs_m, len_q)
    s = masked_product(k, q, key_mask_ptr, bias_ptr, offs_m[None, :], offs_n[:, None],
                       stride_bias_q, len_q, len_k, scale_log2, bias_ptr is not None,
                       INPUT_PRECISION)  # [BLOCK_N, BLOCK_M]  # fmt: skip
    p = weights(s, lse[None, :], scale_log2)
    dp = tl.dot(v, tl.trans(do), input_precision=INPUT_PRECISION)
    dropped = p
    if DROPOUT_BITS:
        keep = keep_scores(key_0, key_1, offs_m[None, :], first_m, offs_n[:, None], first_n,
                           dropout_threshold, DROPOUT_BITS)  # fmt: skip
        dropped = tl.where(keep, p, nothing)
    acc_dv = tl.dot(dropped.to(do.dtype), do, acc_dv, input_precision=INPUT_PRECISION)
    # With dropout dv's choice does for ds as well.
    ds = dropped * dp - p * delta[None, :] if DROPOUT_BITS else p * (dp - delta[None, :])
    acc_dk = tl.dot(ds.to(q.dtype), q, acc_dk, input_precision=INPUT_PRECISION)
    return acc_dk, acc_dv


@triton.jit(
    do_not_specialize=[
        "stride_lse_b", "stride_lse_h", "stride_mask_b", "tiles_per_sequence", "len_q", "len_k",
        "dropout_threshold",
    ]
)  # fmt: skip
def _attention_bwd_kernel_dkdv(
    dk_ptr, dv_ptr,  # [T, H, D] or [B, H, S, D], as everything else
    do_ptr, q_ptr, k_ptr, v_ptr,
    pairs_ptr,  # [H, T, 2] or [B, H, S, 2], fp32: lse and delta
    key_mask_ptr,  # [B, Sk] or None
    bias_ptr,  # [B, H, Sq, Sk], the last stride 1, or None
    seed_ptr,  # [1] int64 or None
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, tile_map_ptr,  # or None; tiles of keys
    stride_dk_b, stride_dk_t, stride_dk_h,
    stride_dv_b, stride_dv_t, stride_dv_h,
    stride_do_b, stride_do_t, stride_do_h,
    stride_q_b, stride_q_t, stride_q_h,
    stride_k_b, stride_k_t, stride_k_h,
    stride_v_b, stride_v_t, stride_v_h,
    stride_lse_b, stride_lse_h,
    stride_mask_b,
    stride_bias_b, stride_bias_h, stride_bias_q,
    tiles_per_sequence, len_q, len_k,
    scale, scale_log2, dropout_threshold, dropout_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    RELOAD: tl.constexpr, DROPOUT_BITS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, tile, q_start, k_start, seq_q, seq_k = locate(
        tile_map_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, tiles_per_sequence, len_q, len_k
    )
    head = tl.program_id(1).to(tl.int64)
    first_n = tile * BLOCK_N
    row = k_start + first_n
    seq_k -= first_n  # keys from this tile on; pointers move to its first one
    q_ptr += sequence * stride_q_b + q_start * stride_q_t + head * stride_q_h
    do_ptr += sequence * stride_do_b + q_start * stride_do_t + head * stride_do_h
    k_ptr += sequence * stride_k_b + row * stride_k_t + head * stride_k_h
    v_ptr += sequence * stride_v_b + row * stride_v_t + head * stride_v_h
    dk_ptr += sequence * stride_dk_b + row * stride_dk_t + head * stride_dk_h
    dv_ptr += sequence * stride_dv_b + row * stride_dv_t + head * stride_dv_h
    pairs_ptr += 2 * (sequence * stride_lse_b + head * stride_lse_h + q_start)
    if key_mask_ptr is not None:
        key_mask_ptr += sequence * stride_mask_b + first_n
    if bias_ptr is not None:
        bias_ptr += sequence * stride_bias_b + head * stride_bias_h + first_n
    key_0, key_1 = 0, 0
    if DROPOUT_BITS:
        key_0, key_1 = dropout_keys(seed_ptr, sequence, head)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    k = load_rows(k_ptr, offs_n, offs_d, stride_k_t, seq_k, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_ptr, offs_n, offs_d, stride_v_t, seq_k, HEAD_DIM, BLOCK_D, True)
    nothing = dropout_scale - dropout_scale  # 0, as in forward
    acc_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    step = tl.full([], BLOCK_M, tl.int64)
    for i in range(seq_q // BLOCK_M):
        if RELOAD:
            k = load_rows(k_ptr, offs_n, offs_d, stride_k_t, seq_k, HEAD_DIM, BLOCK_D, True)
            v = load_rows(v_ptr, offs_n, offs_d, stride_v_t, seq_k, HEAD_DIM, BLOCK_D, True)
        acc_dk, acc_dv = _dkdv_step(
            acc_dk, acc_dv, k, v, q_ptr, do_ptr, pairs_ptr, key_mask_ptr, bias_ptr,
            offs_m, offs_n, offs_d, stride_q_t, stride_do_t, stride_bias_q, BLOCK_M, seq_k,
            scale_log2, key_0, key_1, i * BLOCK_M, first_n, dropout_threshold, nothing,
            HEAD_DIM, BLOCK_D, False, DROPOUT_BITS, INPUT_PRECISION,
        )  # fmt: skip
        q_ptr += step * stride_q_t
        do_ptr += step * stride_do_t
        pairs_ptr += 2 * BLOCK_M
        if bias_ptr is not None:
            bias_ptr += step * stride_bias_q
    rest = seq_q % BLOCK_M
    if rest > 0:
        acc_dk, acc_dv = _dkdv_step(
            acc_dk, acc_dv, k, v, q_ptr, do_ptr, pairs_ptr, key_mask_ptr, bias_ptr,
            offs_m, offs_n, offs_d, stride_q_t, stride_do_t, stride_bias_q, rest, seq_k,
            scale_log2, key_0, key_1, seq_q - rest, first_n, dropout_threshold, nothing,
            HEAD_DIM, BLOCK_D, True, DROPOUT_BITS, INPUT_PRECISION,
        )  # fmt: skip
    if DROPOUT_BITS:
        scale *= dropout_scale
        acc_dv *= dropout_scale
    _store_rows(dk_ptr, acc_dk * scale, offs_n, offs_d, stride_dk_t, seq_k, HEAD_DIM)
    _store_rows(dv_ptr, acc_dv, offs_n, offs_d, stride_dv_t, seq_k, HEAD_DIM)


@triton.jit(
    do_not_specialize=[
        "stride_lse_b", "stride_lse_h", "stride_mask_b", "len_q", "len_k", "dropout_threshold",
    ]
)  # fmt: skip
def _attention_bwd_kernel_whole(
    dq_ptr, dk_ptr, dv_ptr,  # [T, H, D] or [B, H, S, D], as everything else
    pairs_ptr,  # [H, T, 2] or [B, H, S, 2], fp32: lse and delta
    do_ptr, out_ptr, q_ptr, k_ptr, v_ptr,
    lse_ptr,  # [H, T] or [B, H, S], fp32, log2 units
    key_mask_ptr,  # [B, Sk] or None
    bias_ptr,  # [B, H, Sq, Sk], the last stride 1, or None
    seed_ptr,  # [1] int64 or None
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, tile_map_ptr,  # or None; one tile for each sequence
    stride_dq_b, stride_dq_t, stride_dq_h,
    stride_dk_b, stride_dk_t, stride_dk_h,
    stride_dv_b, stride_dv_t, stride_dv_h,
    stride_do_b, stride_do_t, stride_do_h,
    stride_out_b, stride_out_t, stride_out_h,
    stride_q_b, stride_q_t, stride_q_h,
    stride_k_b, stride_k_t, stride_k_h,
    stride_v_b, stride_v_t, stride_v_h,
    stride_lse_b, stride_lse_h,
    stride_mask_b,
    stride_bias_b, stride_bias_h, stride_bias_q,
    len_q, len_k,
    scale, scale_log2, dropout_threshold, dropout_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DROPOUT_BITS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    q_start, k_start, seq_q, seq_k = sequence * 0, sequence * 0, len_q, len_k
    if tile_map_ptr is not None:
        sequence, _, q_start, k_start, seq_q, seq_k = locate(
            tile_map_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, 1, len_q, len_k
        )
    head = tl.program_id(1).to(tl.int64)
    q_ptr += sequence * stride_q_b + q_start * stride_q_t + head * stride_q_h
    k_ptr += sequence * stride_k_b + k_start * stride_k_t + head * stride_k_h
    v_ptr += sequence * stride_v_b + k_start * stride_v_t + head * stride_v_h
    do_ptr += sequence * stride_do_b + q_start * stride_do_t + head * stride_do_h
    out_ptr += sequence * stride_out_b + q_start * stride_out_t + head * stride_out_h
    dq_ptr += sequence * stride_dq_b + q_start * stride_dq_t + head * stride_dq_h
    dk_ptr += sequence * stride_dk_b + k_start * stride_dk_t + head * stride_dk_h
    dv_ptr += sequence * stride_dv_b + k_start * stride_dv_t + head * stride_dv_h
    statistics = sequence * stride_lse_b + head * stride_lse_h + q_start
    if key_mask_ptr is not None:
        key_mask_ptr += sequence * stride_mask_b
    if bias_ptr is not None:
        bias_ptr += sequence * stride_bias_b + head * stride_bias_h

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    q = load_rows(q_ptr, offs_m, offs_d, stride_q_t, seq_q, HEAD_DIM, BLOCK_D, True)
    k = load_rows(k_ptr, offs_n, offs_d, stride_k_t, seq_k, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_ptr, offs_n, offs_d, stride_v_t, seq_k, HEAD_DIM, BLOCK_D, True)
    do = load_rows(do_ptr, offs_m, offs_d, stride_do_t, seq_q, HEAD_DIM, BLOCK_D, True)
    delta = _row_sums(do, out_ptr, offs_m, offs_d, stride_out_t, seq_q, dropout_scale, HEAD_DIM,
                      BLOCK_D, DROPOUT_BITS)  # fmt: skip
    lse = load_lse(lse_ptr + statistics, offs_m, seq_q)
    _store_pairs(pairs_ptr + 2 * statistics, lse, delta, offs_m, seq_q)
    s = masked_product(k, q, key_mask_ptr, bias_ptr, offs_m[None, :], offs_n[:, None],
                       stride_bias_q, seq_q, seq_k, scale_log2, True,
                       INPUT_PRECISION)  # [BLOCK_N, BLOCK_M]  # fmt: skip
    p = weights(s, lse[None, :], scale_log2)
    dp = tl.dot(v, tl.trans(do), input_precision=INPUT_PRECISION)
    dropped = p
    if DROPOUT_BITS:
        key_0, key_1 = dropout_keys(seed_ptr, sequence, head)
        keep = keep_scores(key_0, key_1, offs_m[None, :], 0, offs_n[:, None], 0,
                           dropout_threshold, DROPOUT_BITS)  # fmt: skip
        dropped = tl.where(keep, p, dropout_scale - dropout_scale)  # 0, as in forward
        dp = tl.where(keep, dp, 0.0)  # for the registers: ``dropped`` is left to the product
        scale *= dropout_scale
    dv = tl.dot(dropped.to(do.dtype), do, input_precision=INPUT_PRECISION)
    if DROPOUT_BITS:
        dv *= dropout_scale
    _store_rows(dv_ptr, dv, offs_n, offs_d, stride_dv_t, seq_k, HEAD_DIM)
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    dk = tl.dot(ds, q, input_precision=INPUT_PRECISION)
    _store_rows(dk_ptr, dk * scale, offs_n, offs_d, stride_dk_t, seq_k, HEAD_DIM)
    dq = tl.dot(tl.trans(ds), k, input_precision=INPUT_PRECISION)
    _store_rows(dq_ptr, dq * scale, offs_m, offs_d, stride_dq_t, seq_q, HEAD_DIM)
