"""Bidirectional attention, forward: ``softmax(q k^T * scale + bias) v``, the scores never stored.

Two forms share every line of arithmetic. Packed: sequences one after the other, bounds from
cumulative lengths, programs from a tile map that has one entry per tile that exists. Padded: ``[B,
H, S, D]`` with an optional key mask and additive bias. In both, q, k and v are read with their
strides, so that they may be views of one projection ``[T, 3, H, D]``, and the output is written as
``[T, H, D]``.

Two bodies. Where the longest sequence's keys fit one tile (``SINGLE``) it is a plain softmax
without rescaling. Otherwise it walks over tiles of keys (online softmax: Milakov and Gimelshein,
1805.02867; FlashAttention: Dao et al., 2205.14135): full tiles without any bounds check, then one
masked tail. The scale is applied after the product, in fp32, not to the 16-bit q. exp is exp2 of
scores in units of log2; without a bias, scaling and taking off the maximum are one fma, which is an
instruction less for every score. So the scale must be positive.

Kept for backward: the log-sum-exp of each row, fp32, in log2 units, ``-inf`` for a row without a
key. Such a row gives zeros. Scores and statistics are fp32; p is rounded to v's dtype before the
second product.
"""

import torch
import triton
import triton.language as tl

from ._common import LOG2E
from ._device import device_arch, input_precision, on_device
from ._tiles import AttentionTile, attention_tile

__all__ = ["attention_padded_fwd", "attention_varlen_fwd"]


@triton.jit
def _load_rows(ptr, offs_r, offs_d, stride_r, length, HEAD_DIM: tl.constexpr,
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
def _scores(q, k_ptr, key_mask_ptr, bias_ptr, offs_m, offs_n, offs_d, stride_k_t, stride_bias_q,
            stride_bias_k, len_q, len_k, scale_log2, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
            CHECK_KEYS: tl.constexpr, INPUT_PRECISION: tl.constexpr):  # fmt: skip
    """One tile of scores, [BLOCK_M, BLOCK_N], -inf where a query may not look.

    As the product gives them without a bias; scaled and in log2 units with one. Pointers are at the
    tile's first query and key; ``len_q`` and ``len_k`` count from there.
    """
    k = _load_rows(k_ptr, offs_n, offs_d, stride_k_t, len_k, HEAD_DIM, BLOCK_D, CHECK_KEYS)
    s = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
    mask_n = offs_n < len_k
    if bias_ptr is not None:
        bias_ptrs = (
            bias_ptr
            + offs_m.to(tl.int64)[:, None] * stride_bias_q
            + offs_n.to(tl.int64)[None, :] * stride_bias_k
        )
        mask_m = offs_m < len_q
        if CHECK_KEYS:
            bias = tl.load(bias_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        else:
            bias = tl.load(bias_ptrs, mask=mask_m[:, None], other=0.0)  # [BLOCK_M, BLOCK_N]
        s = s * scale_log2 + bias.to(tl.float32) * LOG2E
    if key_mask_ptr is not None:
        keep = tl.load(key_mask_ptr + offs_n, mask=mask_n, other=0)  # [BLOCK_N]
        s = tl.where((keep != 0)[None, :], s, float("-inf"))
    elif CHECK_KEYS:
        s = tl.where(mask_n[None, :], s, float("-inf"))
    return s


@triton.jit
def _highest(s, scale_log2, SCALED: tl.constexpr):
    """The largest score of each row in log2 units, [BLOCK_M]; the scale is positive."""
    if SCALED:
        return tl.max(s, 1)
    else:
        return tl.max(s, 1) * scale_log2


@triton.jit
def _weights(s, pivot, scale_log2, SCALED: tl.constexpr):
    """``exp2(scores - pivot)``; scale and subtraction are one operation with one rounding."""
    if SCALED:
        return tl.exp2(s - pivot[:, None])
    else:
        return tl.exp2(tl.fma(s, scale_log2, -pivot[:, None]))


@triton.jit
def _online_step(acc, m_i, l_i, q, k_ptr, v_ptr, key_mask_ptr, bias_ptr, offs_m, offs_n, offs_d,
                 stride_k_t, stride_v_t, stride_bias_q, stride_bias_k, len_q, len_k, scale_log2,
                 HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_KEYS: tl.constexpr,
                 INPUT_PRECISION: tl.constexpr):  # fmt: skip
    """Takes one tile of keys into the running maximum, sum and output."""
    s = _scores(q, k_ptr, key_mask_ptr, bias_ptr, offs_m, offs_n, offs_d, stride_k_t, stride_bias_q,
                stride_bias_k, len_q, len_k, scale_log2, HEAD_DIM, BLOCK_D, CHECK_KEYS,
                INPUT_PRECISION)  # fmt: skip
    SCALED: tl.constexpr = bias_ptr is not None
    m_new = tl.maximum(m_i, _highest(s, scale_log2, SCALED))  # [BLOCK_M]
    if (bias_ptr is not None) or (key_mask_ptr is not None):
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)  # finite where no key was seen yet
    else:
        pivot = m_new
    p = _weights(s, pivot, scale_log2, SCALED)
    alpha = tl.exp2(m_i - pivot)
    l_i = l_i * alpha + tl.sum(p, 1)
    v = _load_rows(v_ptr, offs_n, offs_d, stride_v_t, len_k, HEAD_DIM, BLOCK_D, CHECK_KEYS)
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=INPUT_PRECISION)
    return acc, m_new, l_i


@triton.jit
def _locate(tile_map_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, tiles_per_sequence, len_q, len_k):
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
def _store(
    out_ptr, lse_ptr, acc, m_i, l_i, offs_m, offs_d, stride_o_t, seq_q, HEAD_DIM: tl.constexpr
):
    mask_m = offs_m < seq_q
    safe = tl.where(l_i == 0.0, 1.0, l_i)  # a row without keys: zeros, log-sum-exp -inf
    out = (acc / safe[:, None]).to(out_ptr.dtype.element_ty)
    mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * stride_o_t + offs_d[None, :]
    tl.store(out_ptrs, out, mask=mask)
    tl.store(
        lse_ptr + offs_m, tl.where(l_i == 0.0, float("-inf"), m_i + tl.log2(safe)), mask=mask_m
    )


# The strides of lse and mask are lengths; they select no faster code.
@triton.jit(
    do_not_specialize=[
        "stride_lse_b", "stride_lse_h", "stride_mask_b", "tiles_per_sequence", "len_q", "len_k",
    ]
)  # fmt: skip
def _attention_fwd_kernel(
    out_ptr,  # [T, H, D] or [B, S, H, D]
    lse_ptr,  # [H, T] or [B, H, S], fp32
    q_ptr, k_ptr, v_ptr,  # [T, H, D] or [B, H, S, D]
    key_mask_ptr,  # [B, Sk] or None
    bias_ptr,  # [B, H, Sq, Sk] by strides or None
    cu_seqlens_q_ptr, cu_seqlens_k_ptr,  # [B + 1] or None
    tile_map_ptr,  # [tiles, 2] or None
    stride_o_b, stride_o_t, stride_o_h,
    stride_lse_b, stride_lse_h,
    stride_q_b, stride_q_t, stride_q_h,
    stride_k_b, stride_k_t, stride_k_h,
    stride_v_b, stride_v_t, stride_v_h,
    stride_mask_b,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    tiles_per_sequence, len_q, len_k,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SINGLE: tl.constexpr, RELOAD_Q: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, tile, q_start, k_start, seq_q, seq_k = _locate(
        tile_map_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, tiles_per_sequence, len_q, len_k
    )
    head = tl.program_id(1).to(tl.int64)
    first_m = tile.to(tl.int64) * BLOCK_M
    seq_q -= tile * BLOCK_M  # rows from this tile on; pointers move to its first one
    q_ptr += sequence * stride_q_b + (q_start + first_m) * stride_q_t + head * stride_q_h
    k_ptr += sequence * stride_k_b + k_start * stride_k_t + head * stride_k_h
    v_ptr += sequence * stride_v_b + k_start * stride_v_t + head * stride_v_h
    out_ptr += sequence * stride_o_b + (q_start + first_m) * stride_o_t + head * stride_o_h
    lse_ptr += sequence * stride_lse_b + head * stride_lse_h + q_start + first_m
    if key_mask_ptr is not None:
        key_mask_ptr += sequence * stride_mask_b
    if bias_ptr is not None:
        bias_ptr += sequence * stride_bias_b + head * stride_bias_h + first_m * stride_bias_q

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    q = _load_rows(q_ptr, offs_m, offs_d, stride_q_t, seq_q, HEAD_DIM, BLOCK_D, True)
    if SINGLE:
        s = _scores(
            q, k_ptr, key_mask_ptr, bias_ptr, offs_m, offs_n, offs_d, stride_k_t, stride_bias_q,
            stride_bias_k, seq_q, seq_k, scale_log2, HEAD_DIM, BLOCK_D, True, INPUT_PRECISION,
        )  # fmt: skip
        SCALED: tl.constexpr = bias_ptr is not None
        m_i = _highest(s, scale_log2, SCALED)  # [BLOCK_M]
        pivot = tl.where(m_i == float("-inf"), 0.0, m_i)
        p = _weights(s, pivot, scale_log2, SCALED)  # [BLOCK_M, BLOCK_N]
        l_i = tl.sum(p, 1)
        v = _load_rows(v_ptr, offs_n, offs_d, stride_v_t, seq_k, HEAD_DIM, BLOCK_D, True)
        acc = tl.dot(p.to(v.dtype), v, input_precision=INPUT_PRECISION)  # [BLOCK_M, BLOCK_D]
    else:
        m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        step = tl.full([], BLOCK_N, tl.int64)
        for _ in range(seq_k // BLOCK_N):
            if RELOAD_Q:
                q = _load_rows(q_ptr, offs_m, offs_d, stride_q_t, seq_q, HEAD_DIM, BLOCK_D, True)
            acc, m_i, l_i = _online_step(
                acc, m_i, l_i, q, k_ptr, v_ptr, key_mask_ptr, bias_ptr, offs_m, offs_n, offs_d,
                stride_k_t, stride_v_t, stride_bias_q, stride_bias_k, seq_q, BLOCK_N, scale_log2,
                HEAD_DIM, BLOCK_D, False, INPUT_PRECISION,
            )  # fmt: skip
            k_ptr += step * stride_k_t
            v_ptr += step * stride_v_t
            if key_mask_ptr is not None:
                key_mask_ptr += BLOCK_N
            if bias_ptr is not None:
                bias_ptr += step * stride_bias_k
        rest = seq_k % BLOCK_N
        if rest > 0:
            acc, m_i, l_i = _online_step(
                acc, m_i, l_i, q, k_ptr, v_ptr, key_mask_ptr, bias_ptr, offs_m, offs_n, offs_d,
                stride_k_t, stride_v_t, stride_bias_q, stride_bias_k, seq_q, rest, scale_log2,
                HEAD_DIM, BLOCK_D, True, INPUT_PRECISION,
            )  # fmt: skip
    _store(out_ptr, lse_ptr, acc, m_i, l_i, offs_m, offs_d, stride_o_t, seq_q, HEAD_DIM)


def attention_varlen_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    tile_map: torch.Tensor,
    tile: AttentionTile,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed attention.

    Args:
        q: ``[Tq, H, D]``; k, v: ``[Tk, H, D]``; any strides, the last 1.
        cu_seqlens_q, cu_seqlens_k: int32 ``[B + 1]``.
        tile_map: int32 ``[tiles, 2]``, (sequence, tile) pairs for ``tile.block_m``.
        tile: from `fastbert.kernels._tiles.attention_tile` for the longest sequence.
        scale: factor for the scores, positive.

    Returns:
        ``[Tq, H, D]`` contiguous, and the log-sum-exp in log2 units, fp32 ``[H, Tq]``.
    """
    total, num_heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = torch.empty(num_heads, total, dtype=torch.float32, device=q.device)
    if tile_map.shape[0] == 0 or num_heads == 0:
        return out, lse
    strides = (
        0, out.stride(0), out.stride(1), 0, lse.stride(0),
        0, q.stride(0), q.stride(1), 0, k.stride(0), k.stride(1), 0, v.stride(0), v.stride(1),
        0, 0, 0, 0, 0,
    )  # fmt: skip
    _launch(
        out, lse, q, k, v, None, None, cu_seqlens_q, cu_seqlens_k, tile_map, strides,
        (tile_map.shape[0], num_heads), (1, 0, 0), scale, tile,
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded attention.

    Args:
        q: ``[B, H, Sq, D]``; k, v: ``[B, H, Sk, D]``; any strides, the last 1.
        key_mask: bool ``[B, Sk]``, True to attend, or None.
        bias: floating, expanded to ``[B, H, Sq, Sk]``, or None.
        scale: factor for the scores, positive.

    Returns:
        ``[B, H, Sq, D]`` as a view of a contiguous ``[B, Sq, H, D]``, and the log-sum-exp in log2
        units, fp32 ``[B, H, Sq]``.
    """
    batch_size, num_heads, len_q, head_dim = q.shape
    len_k = k.shape[2]
    out = q.new_empty(batch_size, len_q, num_heads, head_dim).transpose(1, 2)
    lse = torch.empty(batch_size, num_heads, len_q, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if key_mask is not None:
        key_mask = key_mask.contiguous()
    tile = attention_tile(
        head_dim=head_dim, dtype=q.dtype, arch=device_arch(q.device),
        max_seqlen_q=len_q, max_seqlen_k=len_k, has_bias=bias is not None,
    )  # fmt: skip
    strides = (
        out.stride(0), out.stride(2), out.stride(1), lse.stride(0), lse.stride(1),
        q.stride(0), q.stride(2), q.stride(1),
        k.stride(0), k.stride(2), k.stride(1),
        v.stride(0), v.stride(2), v.stride(1),
        0 if key_mask is None else key_mask.stride(0),
        *((0, 0, 0, 0) if bias is None else bias.stride()),
    )  # fmt: skip
    tiles = triton.cdiv(len_q, tile.block_m)
    _launch(
        out, lse, q, k, v, key_mask, bias, None, None, None, strides,
        (batch_size * tiles, num_heads), (tiles, len_q, len_k), scale, tile,
    )  # fmt: skip
    return out, lse


def _launch(
    out, lse, q, k, v, key_mask, bias, cu_seqlens_q, cu_seqlens_k, tile_map, strides, grid, sizes,
    scale, tile,
):  # fmt: skip
    head_dim = q.shape[-1]
    assert scale > 0, "the scale must be positive: the largest score is found before scaling"
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "heads must be contiguous"
    with on_device(q.device):
        _attention_fwd_kernel[grid](
            out, lse, q, k, v, key_mask, bias, cu_seqlens_q, cu_seqlens_k, tile_map,
            *strides, *sizes, scale * LOG2E.value,
            HEAD_DIM=head_dim, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_D=tile.block_d, SINGLE=tile.single,
            RELOAD_Q=q.dtype == torch.float32, INPUT_PRECISION=input_precision(q.dtype),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
