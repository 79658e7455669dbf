"""Bidirectional attention, forward: ``softmax(q k^T * scale + bias) v``, the scores never stored.

Two forms share every line of arithmetic. Packed: sequences one after the other, bounds from
cumulative lengths, programs from a tile map that has one entry per tile that exists. Padded: ``[B,
H, S, D]`` with an optional key mask. Either may have an additive bias, which is read by rows
(`by_rows`). q, k and v are read with their strides, so that they may be views of one projection
``[T, 3, H, D]``, and the output is written as ``[T, H, D]``.

Two bodies. Where a sequence's keys fit one tile (``SINGLE``) it is a plain softmax without
rescaling. Otherwise it walks over tiles of keys (online softmax: Milakov and Gimelshein,
1805.02867; FlashAttention: Dao et al., 2205.14135): full tiles without any bounds check, then one
masked tail. The scale is applied after the product, in fp32, not to the 16-bit q. exp is exp2 of
scores in units of log2; scaling and taking off the maximum are one fma, so the scale must be
positive. A bias is divided by the scale and added before it.

Kept for backward, where there will be one: the log-sum-exp of each row, fp32, in log2 units,
``-inf`` for a row without a key. Such a row gives zeros. Scores and statistics are fp32; p is
rounded to v's dtype before the second product. Dropout (`_dropout.py`) drops weights after their
sum was taken.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._common import LOG2E
from ._device import device_arch, input_precision
from ._dropout import dropout_keys, dropout_levels, keep_scores
from ._launch import launch
from ._registers import limited
from ._tiles import AttentionTile, attention_tile, cdiv

__all__ = ["attention_padded_fwd", "attention_varlen_fwd"]
# For backward too: by_rows, for_all, load_lse, load_rows, locate, masked_product, strides_of,
# weights.


@triton.jit
def load_rows(ptr, offs_r, offs_d, stride_r, length, HEAD_DIM: tl.constexpr,
               BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr):  # fmt: skip
    """[rows, BLOCK_D], zeros outside; no mask at all where none is needed."""
    ptrs = ptr + offs_r.to(tl.int64)[:, None] * stride_r + offs_d[None, :]
    if CHECK_ROWS:
        if HEAD_DIM == BLOCK_D:
            return tl.load(ptrs, mask=(offs_r < length)[:, None], other=0.0)
        else:
            mask = (offs_r < length)[:, None] & (offs_d < HEAD_DIM)[None, :]
            return tl.load(ptrs, mask=mask, other=0.0)
    else:
        if HEAD_DIM == BLOCK_D:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_lse(lse_ptr, offs_m, length):
    """The log-sum-exp of rows; +inf, which makes every weight 0, where there is no row or key."""
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < length, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _load_bias(bias_ptr, rows, columns, stride_bias_q, len_q, len_k, factor,
               CHECK_KEYS: tl.constexpr):  # fmt: skip
    """The bias times a factor; for keys outside it is -inf before that."""
    ptrs = bias_ptr + rows.to(tl.int64) * stride_bias_q + columns
    if CHECK_KEYS:
        bias = tl.load(ptrs, mask=(rows < len_q) & (columns < len_k), other=float("-inf"))
    else:
        bias = tl.load(ptrs, mask=rows < len_q, other=0.0)
    return bias.to(tl.float32) * factor


@triton.jit
def masked_product(a, b, key_mask_ptr, bias_ptr, rows, columns, stride_bias_q, len_q, len_k,
                   scale_log2, CHECK_KEYS: tl.constexpr,
                   INPUT_PRECISION: tl.constexpr):  # fmt: skip
    """``a b^T`` and the bias, before scaling, -inf where a query may not look; ``rows`` and
    ``columns`` are expanded like the product, either way round.

    Bias and mask of keys are where the sum of the product starts: it has them then as the matrix
    units leave it, while what is put on it afterwards lies otherwise in the registers of a program,
    as it was read, and every score would be computed for both. (In fp32, which is not on the matrix
    units, terms would be added in another order.)
    """
    if ((key_mask_ptr is not None) or (bias_ptr is not None)) and (a.dtype != tl.float32):
        start = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
        if bias_ptr is not None:
            start = _load_bias(bias_ptr, rows, columns, stride_bias_q, len_q, len_k,
                               LOG2E / scale_log2, CHECK_KEYS)  # fmt: skip
        if key_mask_ptr is not None:
            keep = tl.load(key_mask_ptr + columns, mask=columns < len_k, other=0)
            start = tl.where(keep != 0, start, float("-inf"))
        s = tl.dot(a, tl.trans(b), start, input_precision=INPUT_PRECISION)
    else:
        s = tl.dot(a, tl.trans(b), input_precision=INPUT_PRECISION)
        if bias_ptr is not None:  # taken off: a sum would be made the start by the compiler
            s -= _load_bias(bias_ptr, rows, columns, stride_bias_q, len_q, len_k,
                            -LOG2E / scale_log2, CHECK_KEYS)  # fmt: skip
        if key_mask_ptr is not None:
            keep = tl.load(key_mask_ptr + columns, mask=columns < len_k, other=0)
            s = tl.where(keep != 0, s, float("-inf"))
        elif CHECK_KEYS and (bias_ptr is None):
            s = tl.where(columns < len_k, s, float("-inf"))
    return s


@triton.jit
def _scores(q, k_ptr, key_mask_ptr, bias_ptr, offs_m, offs_n, offs_d, stride_k_t, stride_bias_q,
            len_q, len_k, scale_log2, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
            CHECK_KEYS: tl.constexpr, INPUT_PRECISION: tl.constexpr):  # fmt: skip
    """One masked tile of scores, [BLOCK_M, BLOCK_N].

    Pointers are at the tile's first query and key; ``len_q`` and ``len_k`` count from there.
    """
    k = load_rows(k_ptr, offs_n, offs_d, stride_k_t, len_k, HEAD_DIM, BLOCK_D, CHECK_KEYS)
    return masked_product(
        q, k, key_mask_ptr, bias_ptr, offs_m[:, None], offs_n[None, :], stride_bias_q, len_q,
        len_k, scale_log2, CHECK_KEYS, INPUT_PRECISION,
    )  # fmt: skip


@triton.jit
def weights(s, pivot, scale_log2):
    """``exp2(scores - pivot)``; scale and subtraction are one operation with one rounding."""
    return tl.exp2(tl.fma(s, scale_log2, -pivot))


@triton.jit
def _online_step(acc, m_i, l_i, q, k_ptr, v_ptr, key_mask_ptr, bias_ptr, offs_m, offs_n, offs_d,
                 stride_k_t, stride_v_t, stride_bias_q, len_q, len_k, scale_log2, key_0, key_1,
                 first_m, first_n, dropout_threshold, nothing,
                 HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_KEYS: tl.constexpr,
                 DROPOUT_BITS: tl.constexpr, INPUT_PRECISION: tl.constexpr):  # fmt: skip
    """Takes one tile of keys into the running maximum, sum and output."""
    s = _scores(q, k_ptr, key_mask_ptr, bias_ptr, offs_m, offs_n, offs_d, stride_k_t, stride_bias_q,
                len_q, len_k, scale_log2, HEAD_DIM, BLOCK_D, CHECK_KEYS,
                INPUT_PRECISION)  # fmt: skip
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)  # [BLOCK_M]; the scale is positive
    if (bias_ptr is not None) or (key_mask_ptr is not None):
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)  # finite where no key was seen yet
    else:
        pivot = m_new
    p = weights(s, pivot[:, None], scale_log2)
    alpha = tl.exp2(m_i - pivot)
    l_i = l_i * alpha + tl.sum(p, 1)
    if DROPOUT_BITS:
        keep = keep_scores(key_0, key_1, offs_m[:, None], first_m, offs_n[None, :], first_n,
                           dropout_threshold, DROPOUT_BITS)  # fmt: skip
        p = tl.where(keep, p, nothing)
    v = load_rows(v_ptr, offs_n, offs_d, stride_v_t, len_k, HEAD_DIM, BLOCK_D, CHECK_KEYS)
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=INPUT_PRECISION)
    return acc, m_new, l_i


@triton.jit
def locate(tile_map_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, tiles_per_sequence, len_q, len_k):
    """Which tile this program has: (sequence, tile, first q row, first k row, lengths)."""
    pid = tl.program_id(0)
    if tile_map_ptr is not None:
        sequence = tl.load(tile_map_ptr + 2 * pid)
        tile = tl.load(tile_map_ptr + 2 * pid + 1)
        q_start = tl.load(cu_seqlens_q_ptr + sequence)
        k_start = tl.load(cu_seqlens_k_ptr + sequence)
        seq_q = tl.load(cu_seqlens_q_ptr + sequence + 1) - q_start
        seq_k = tl.load(cu_seqlens_k_ptr + sequence + 1) - k_start
        return sequence.to(tl.int64), tile, q_start.to(tl.int64), k_start.to(tl.int64), seq_q, seq_k
    else:
        zero = tl.program_id(0).to(tl.int64) * 0
        sequence = (pid // tiles_per_sequence).to(tl.int64)
        return sequence, pid % tiles_per_sequence, zero, zero, len_q, len_k


@triton.jit
def _store(out_ptr, lse_ptr, acc, m_i, l_i, offs_m, offs_d, stride_o_t, seq_q, dropout_scale,
           HEAD_DIM: tl.constexpr, DROPOUT_BITS: tl.constexpr):  # fmt: skip
    mask_m = offs_m < seq_q
    safe = tl.where(l_i == 0.0, 1.0, l_i)  # a row without keys: zeros, log-sum-exp -inf
    acc = acc / safe[:, None]
    if DROPOUT_BITS:
        acc *= dropout_scale
    out = acc.to(out_ptr.dtype.element_ty)
    mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * stride_o_t + offs_d[None, :]
    tl.store(out_ptrs, out, mask=mask)
    if lse_ptr is not None:
        lse = tl.where(l_i == 0.0, float("-inf"), m_i + tl.log2(safe))
        tl.store(lse_ptr + offs_m, lse, mask=mask_m)


# The strides of lse and mask are lengths; they select no faster code.
@triton.jit(
    do_not_specialize=[
        "stride_lse_b", "stride_lse_h", "stride_mask_b", "tiles_per_sequence", "len_q", "len_k",
        "dropout_threshold",
    ]
)  # fmt: skip
def _attention_fwd_kernel(
    out_ptr,  # [T, H, D] or [B, S, H, D]
    lse_ptr,  # [H, T] or [B, H, S], fp32, or None
    q_ptr, k_ptr, v_ptr,  # [T, H, D] or [B, H, S, D]
    key_mask_ptr,  # [B, Sk] or None
    bias_ptr,  # [B, H, Sq, Sk], the last stride 1, or None; packed, by places in a sequence
    seed_ptr,  # [1] int64, read with dropout only
    cu_seqlens_q_ptr, cu_seqlens_k_ptr,  # [B + 1] or None
    tile_map_ptr,  # [tiles, 2] or None
    stride_o_b, stride_o_t, stride_o_h,
    stride_lse_b, stride_lse_h,
    stride_q_b, stride_q_t, stride_q_h,
    stride_k_b, stride_k_t, stride_k_h,
    stride_v_b, stride_v_t, stride_v_h,
    stride_mask_b,
    stride_bias_b, stride_bias_h, stride_bias_q,
    tiles_per_sequence, len_q, len_k,
    scale_log2, dropout_threshold, dropout_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SINGLE: tl.constexpr, RELOAD_Q: tl.constexpr, DROPOUT_BITS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, tile, q_start, k_start, seq_q, seq_k = locate(
        tile_map_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, tiles_per_sequence, len_q, len_k
    )
    head = tl.program_id(1).to(tl.int64)
    first_m = tile.to(tl.int64) * BLOCK_M
    seq_q -= tile * BLOCK_M  # rows from this tile on; pointers move to its first one
    q_ptr += sequence * stride_q_b + (q_start + first_m) * stride_q_t + head * stride_q_h
    k_ptr += sequence * stride_k_b + k_start * stride_k_t + head * stride_k_h
    v_ptr += sequence * stride_v_b + k_start * stride_v_t + head * stride_v_h
    out_ptr += sequence * stride_o_b + (q_start + first_m) * stride_o_t + head * stride_o_h
    if lse_ptr is not None:
        lse_ptr += sequence * stride_lse_b + head * stride_lse_h + q_start + first_m
    if key_mask_ptr is not None:
        key_mask_ptr += sequence * stride_mask_b
    if bias_ptr is not None:
        bias_ptr += sequence * stride_bias_b + head * stride_bias_h + first_m * stride_bias_q

    key_0, key_1 = 0, 0
    if DROPOUT_BITS:
        key_0, key_1 = dropout_keys(seed_ptr, sequence, head)
    # Zero, which the compiler cannot know: it would choose between 16-bit values, one by one, after
    # the conversion of two at a time.
    nothing = dropout_scale - dropout_scale
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    q = load_rows(q_ptr, offs_m, offs_d, stride_q_t, seq_q, HEAD_DIM, BLOCK_D, True)
    if SINGLE:
        # Under way while the weights are computed, where there are registers for it.
        EARLY: tl.constexpr = q.dtype != tl.float32 and DROPOUT_BITS == 0
        if EARLY:
            v = load_rows(v_ptr, offs_n, offs_d, stride_v_t, seq_k, HEAD_DIM, BLOCK_D, True)
        s = _scores(
            q, k_ptr, key_mask_ptr, bias_ptr, offs_m, offs_n, offs_d, stride_k_t, stride_bias_q,
            seq_q, seq_k, scale_log2, HEAD_DIM, BLOCK_D, True, INPUT_PRECISION,
        )  # fmt: skip
        m_i = tl.max(s, 1) * scale_log2  # [BLOCK_M]
        pivot = tl.where(m_i == float("-inf"), 0.0, m_i)
        p = weights(s, pivot[:, None], scale_log2)  # [BLOCK_M, BLOCK_N]
        l_i = tl.sum(p, 1)
        if DROPOUT_BITS:
            keep = keep_scores(
                key_0, key_1, offs_m[:, None], tile * BLOCK_M, offs_n[None, :], 0,
                dropout_threshold, DROPOUT_BITS,
            )  # fmt: skip
            p = tl.where(keep, p, nothing)
        if not EARLY:
            v = load_rows(v_ptr, offs_n, offs_d, stride_v_t, seq_k, HEAD_DIM, BLOCK_D, True)
        acc = tl.dot(p.to(v.dtype), v, input_precision=INPUT_PRECISION)  # [BLOCK_M, BLOCK_D]
    else:
        m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        step = tl.full([], BLOCK_N, tl.int64)
        for i in range(seq_k // BLOCK_N):
            if RELOAD_Q:
                q = load_rows(q_ptr, offs_m, offs_d, stride_q_t, seq_q, HEAD_DIM, BLOCK_D, True)
            acc, m_i, l_i = _online_step(
                acc, m_i, l_i, q, k_ptr, v_ptr, key_mask_ptr, bias_ptr, offs_m, offs_n, offs_d,
                stride_k_t, stride_v_t, stride_bias_q, seq_q, BLOCK_N, scale_log2, key_0, key_1,
                tile * BLOCK_M, i * BLOCK_N, dropout_threshold, nothing,
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
            acc, m_i, l_i = _online_step(
                acc, m_i, l_i, q, k_ptr, v_ptr, key_mask_ptr, bias_ptr, offs_m, offs_n, offs_d,
                stride_k_t, stride_v_t, stride_bias_q, seq_q, rest, scale_log2, key_0, key_1,
                tile * BLOCK_M, seq_k - rest, dropout_threshold, nothing,
                HEAD_DIM, BLOCK_D, True, DROPOUT_BITS, INPUT_PRECISION,
            )  # fmt: skip
    _store(out_ptr, lse_ptr, acc, m_i, l_i, offs_m, offs_d, stride_o_t, seq_q, dropout_scale,
           HEAD_DIM, DROPOUT_BITS)  # fmt: skip


def strides_of(t: torch.Tensor | None) -> tuple[int, int, int]:
    """Strides of sequences, rows and heads, of ``[T, H, D]`` or ``[B, H, S, D]``."""
    if t is None:
        return 0, 0, 0
    if t.dim() == 3:
        return 0, t.stride(0), t.stride(1)
    return t.stride(0), t.stride(2), t.stride(1)


def by_rows(bias: torch.Tensor | None) -> torch.Tensor | None:
    """A bias ``[B, H, Sq, Sk]`` whose keys lie next to each other, as the kernels read it, with a
    stride of 0 where it had one: a copy if they do not. (Read as they are, each key of a row would
    be a read of its own in memory and an address of its own in registers.)"""
    if bias is None or bias.stride(3) == 1 or bias.shape[3] == 1:
        return bias
    one = tuple(slice(None if stride else 1) for stride in bias.stride()[:2])
    return bias[one].contiguous().expand(bias.shape)


def for_all(bias: torch.Tensor | None) -> torch.Tensor | None:
    """``[H, S, S]`` as ``[2, H, S, S]``, the same for all sequences, `by_rows`."""
    return None if bias is None else by_rows(bias.expand(2, -1, -1, -1))


def attention_varlen_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    parts: Sequence[tuple[torch.Tensor, AttentionTile]],
    *,
    scale: float,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    keep_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Packed attention.

    Args:
        q: ``[Tq, H, D]``; k, v: ``[Tk, H, D]``; any strides, the last 1.
        cu_seqlens_q, cu_seqlens_k: int32 ``[B + 1]``.
        parts: for each class of sequences, whose lengths `fastbert.kernels._tiles.attention_bounds`
            has, a tile map, int32 ``[tiles, 2]``, (sequence, tile) pairs for ``tile.block_m``, and
            the tile from `fastbert.kernels._tiles.attention_tile`.
        scale: factor for the scores, positive.
        dropout_p, seed: probability of dropping a weight, and an int64 ``[1]`` if it is not 0.
        bias: floating ``[H, S, S]`` for all sequences, S at least the longest one's length; or
            None.
        keep_lse: write the log-sum-exp too, for backward.

    Returns:
        ``[Tq, H, D]`` contiguous, and the log-sum-exp in log2 units, fp32 ``[H, Tq]``, or None.
    """
    total, num_heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = None
    if keep_lse:
        lse = torch.empty(num_heads, total, dtype=torch.float32, device=q.device)
    for tile_map, tile in parts:
        if tile_map.shape[0] and num_heads:
            maps = (cu_seqlens_q, cu_seqlens_k, tile_map)
            _launch(
                out, lse, q, k, v, None, for_all(bias), seed, maps,
                (tile_map.shape[0], num_heads), (1, 0, 0), scale, dropout_p, tile,
            )  # fmt: skip
    return out, lse


def attention_padded_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    scale: float,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    keep_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Padded attention.

    Args:
        q: ``[B, H, Sq, D]``; k, v: ``[B, H, Sk, D]``; any strides, the last 1.
        key_mask: bool ``[B, Sk]``, True to attend, or None.
        bias: floating, expanded to ``[B, H, Sq, Sk]``, or None.
        scale: factor for the scores, positive.
        dropout_p, seed: probability of dropping a weight, and an int64 ``[1]`` if it is not 0.
        keep_lse: write the log-sum-exp too, for backward.

    Returns:
        ``[B, H, Sq, D]`` as a view of a contiguous ``[B, Sq, H, D]``, and the log-sum-exp in log2
        units, fp32 ``[B, H, Sq]``, or None.
    """
    batch_size, num_heads, len_q, head_dim = q.shape
    len_k = k.shape[2]
    out = q.new_empty(batch_size, len_q, num_heads, head_dim).transpose(1, 2)
    lse = None
    if keep_lse:
        lse = torch.empty(batch_size, num_heads, len_q, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    tile = attention_tile(
        head_dim=head_dim, dtype=q.dtype, arch=device_arch(q.device),
        max_seqlen_q=len_q, max_seqlen_k=len_k, has_bias=bias is not None,
    )  # fmt: skip
    tiles = cdiv(len_q, tile.block_m)
    _launch(
        out, lse, q, k, v, None if key_mask is None else key_mask.contiguous(), by_rows(bias),
        seed, (None, None, None), (batch_size * tiles, num_heads), (tiles, len_q, len_k), scale,
        dropout_p, tile,
    )  # fmt: skip
    return out, lse


def _launch(
    out, lse, q, k, v, key_mask, bias, seed, maps, grid, sizes, scale, dropout_p, tile
):  # fmt: skip
    assert scale > 0, "the scale must be positive: the largest score is found before scaling"
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "heads must be contiguous"
    bits, threshold, dropout_scale = dropout_levels(dropout_p, coarse=True)
    precision = input_precision(q.dtype)
    tile = limited(tile, _attention_fwd_kernel, q, key_mask, bias, bits, precision)
    launch(
        _attention_fwd_kernel, grid,
        out, lse, q, k, v, key_mask, bias, seed if bits else None, *maps,
        *strides_of(out), *((0, 0) if lse is None else (0, *lse.stride())[-3:-1]),
        *strides_of(q), *strides_of(k), *strides_of(v),
        0 if key_mask is None else key_mask.stride(0),
        *((0, 0, 0) if bias is None else bias.stride()[:3]),
        *sizes, scale * LOG2E.value, threshold, dropout_scale,
        HEAD_DIM=q.shape[-1], BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        BLOCK_D=tile.block_d, SINGLE=tile.single, RELOAD_Q=q.dtype == torch.float32,
        DROPOUT_BITS=bits, INPUT_PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.max_registers,
    )  # fmt: skip
