"""Bidirectional attention, over packed sequences or a padded batch.

Both forms never build the matrix of scores (Dao et al., 2205.14135; Milakov and Gimelshein,
1805.02867, for the online softmax). The packed form reads q, k and v with whatever strides they
have, so that they may be views of one projection ``[T, 3, H, D]``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import PackedBatch
from .backend import forced, resolve
from .gradient import run_kernel
from .registry import define

__all__ = ["attention", "attention_varlen"]

_MAX_HEAD_SIZE = 128


def _launch_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    tile_map: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
) -> Tensor:
    from ..kernels.attention import attention_varlen_fwd

    q, scale = _positive(q, scale)
    tile = _varlen_tile(q, max_seqlen_q, max_seqlen_k)
    return attention_varlen_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, tile_map, tile, scale=scale)[0]


def _launch_padded(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float
) -> Tensor:
    from ..kernels.attention import attention_padded_fwd

    q, scale = _positive(q, scale)
    return attention_padded_fwd(q, k, v, key_mask, bias, scale=scale)[0]


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores with a positive scale, which the kernels need."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)


def _varlen_tile(q: Tensor, max_seqlen_q: int, max_seqlen_k: int):
    from ..kernels._device import device_arch
    from ..kernels._tiles import attention_tile

    return attention_tile(
        head_dim=q.shape[-1],
        dtype=q.dtype,
        arch=device_arch(q.device),
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )


_attention_varlen = define(
    "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "Tensor tile_map, int max_seqlen_q, int max_seqlen_k, float scale) -> Tensor",
    _launch_varlen,
    lambda q, *rest: q.new_empty(q.shape),
)
_attention_padded = define(
    "attention_padded(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? bias, "
    "float scale) -> Tensor",
    _launch_padded,
    lambda q, *rest: q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2),
)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: PackedBatch,
    *,
    key_batch: PackedBatch | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``softmax(q @ k.T * scale) @ v`` within each sequence of a packed batch, no padding anywhere.

    Args:
        q: ``[Tq, H, D]``, any strides with a last one of 1.
        k, v: ``[Tk, H, D]``, the same.
        batch: the sequences of ``q``, and of ``k`` and ``v`` unless ``key_batch`` is given.
        key_batch: the sequences of ``k`` and ``v`` where they differ (cross-attention); as many.
        scale: factor for the scores, ``D ** -0.5`` if None.
        dropout_p: probability of dropping an attention weight.

    Returns:
        ``[Tq, H, D]``, contiguous. A query whose sequence has no keys gives zeros.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other or the batch.
        NotImplementedError: with the Triton backend forced, a head size over 128 or dropout.

    Supported: fp32, fp16, bf16 (fp64 in torch), head sizes up to 128 (any in torch), gradients.
    Dropout and larger heads run in torch unless the Triton backend is forced.
    """
    keys = batch if key_batch is None else key_batch
    _validate(q, k, v, 3)
    if q.shape[0] != batch.num_tokens or k.shape[0] != keys.num_tokens:
        raise ValueError(
            f"attention_varlen: expected {batch.num_tokens} query and {keys.num_tokens} key rows "
            f"for this batch, got {q.shape=}, {k.shape=}"
        )
    if keys.num_sequences != batch.num_sequences:
        raise ValueError(
            f"attention_varlen: expected key_batch with {batch.num_sequences} sequences, "
            f"got {keys.num_sequences}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if _backend(q, dropout_p) == "torch" or q.numel() == 0:
        return _varlen_in_torch(q, k, v, batch, keys, scale, dropout_p)
    tile = _varlen_tile(q, batch.max_seqlen, keys.max_seqlen)
    tile_map = batch.tile_map(tile.block_m)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attention_varlen(
            q, k, v, batch.cu_seqlens, keys.cu_seqlens, tile_map,
            batch.max_seqlen, keys.max_seqlen, scale,
        )  # fmt: skip

    def in_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _varlen_in_torch(q, k, v, batch, keys, scale, 0.0)

    return run_kernel(kernel, in_torch, q, k, v)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``softmax(q @ k.T * scale + bias) @ v`` over a padded batch.

    Args:
        q: ``[B, H, Sq, D]``, any strides with a last one of 1.
        k, v: ``[B, H, Sk, D]``, the same.
        key_mask: ``[B, Sk]`` bool, True for keys to attend to, or None.
        bias: broadcasts to ``[B, H, Sq, Sk]``; floating, added to the scaled scores (``-inf``
            masks), or bool, True for pairs to attend to, or None.
        scale: factor for the scores, ``D ** -0.5`` if None.
        dropout_p: probability of dropping an attention weight.

    Returns:
        ``[B, H, Sq, D]``, a transposed view of a contiguous ``[B, Sq, H, D]``. A query that may
        attend to no key gives zeros.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        NotImplementedError: with the Triton backend forced, a head size over 128 or dropout.

    Supported: fp32, fp16, bf16 (fp64 in torch), head sizes up to 128 (any in torch), gradients for
    q, k, v and bias. Dropout and larger heads run in torch unless the Triton backend is forced.
    """
    _validate(q, k, v, 4)
    batch_size, num_heads, len_q, head_size = q.shape
    len_k = k.shape[2]
    if key_mask is not None and (
        key_mask.shape != (batch_size, len_k) or key_mask.dtype != torch.bool
    ):
        raise ValueError(
            f"attention: expected a bool key_mask {(batch_size, len_k)}, "
            f"got {key_mask.dtype} {tuple(key_mask.shape)}"
        )
    if bias is not None:
        try:
            bias = bias.expand(batch_size, num_heads, len_q, len_k)
        except RuntimeError:
            raise ValueError(
                "attention: expected a bias that broadcasts to "
                f"{(batch_size, num_heads, len_q, len_k)}, got {tuple(bias.shape)}"
            ) from None
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill_(~bias, -math.inf)
    scale = head_size**-0.5 if scale is None else scale
    if _backend(q, dropout_p) == "torch" or q.numel() == 0:
        return _padded_in_torch(q, k, v, key_mask, bias, scale, dropout_p)
    return run_kernel(_attention_padded, _padded_in_torch, q, k, v, key_mask, bias, scale)


def _validate(q: Tensor, k: Tensor, v: Tensor, dims: int) -> None:
    if not (q.dim() == k.dim() == v.dim() == dims) or k.shape != v.shape:
        raise ValueError(
            f"attention: expected {dims} dimensions and k like v, "
            f"got {q.shape=}, {k.shape=}, {v.shape=}"
        )
    heads = 1 if dims == 4 else -2
    if q.shape[-1] != k.shape[-1] or q.shape[heads] != k.shape[heads]:
        raise ValueError(
            f"attention: expected q and k with the same heads, got {q.shape=}, {k.shape=}"
        )
    if not (q.dtype == k.dtype == v.dtype) or not (q.device == k.device == v.device):
        raise ValueError(
            "attention: expected q, k and v of one dtype on one device, got "
            + ", ".join(f"{t.dtype} on {t.device}" for t in (q, k, v))
        )


def _backend(q: Tensor, dropout_p: float) -> str:
    """What the kernels do not cover runs in torch, unless the kernels are forced."""
    chosen = resolve(q.device)
    if chosen == "torch":
        return chosen
    gap = None
    if q.shape[-1] > _MAX_HEAD_SIZE:
        gap = f"head sizes up to {_MAX_HEAD_SIZE}, got {q.shape[-1]}"
    elif dropout_p > 0.0:
        gap = f"no dropout, got dropout_p={dropout_p}"
    elif q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        gap = f"fp32, fp16 and bf16, got {q.dtype}"
    if gap is None:
        return chosen
    if forced() == "triton":
        raise NotImplementedError(
            f"attention: the Triton kernels support {gap}; leave the backend open or choose 'torch'"
        )
    return "torch"


def _varlen_in_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: PackedBatch,
    keys: PackedBatch,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """SDPA over runs of equally long neighbours: views of the packed rows, one copy at the end."""
    if keys is not batch and keys.lengths != batch.lengths:
        return _cross_in_torch(q, k, v, batch, keys, scale, dropout_p)
    parts = []
    for row, count, length in batch.runs():
        part = F.scaled_dot_product_attention(
            *(
                t[row : row + count * length].unflatten(0, (count, length)).transpose(1, 2)
                for t in (q, k, v)
            ),
            dropout_p=dropout_p,
            scale=scale,
        )
        parts.append(part.transpose(1, 2).flatten(0, 1))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else q.new_zeros(q.shape)


def _cross_in_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: PackedBatch,
    keys: PackedBatch,
    scale: float,
    dropout_p: float,
) -> Tensor:
    parts = []
    rows = zip(q.split(batch.lengths), k.split(keys.lengths), v.split(keys.lengths), strict=True)
    for q_i, k_i, v_i in rows:
        if k_i.shape[0] == 0:
            parts.append(q_i.new_zeros(q_i.shape))
        elif q_i.shape[0]:
            heads_first = (t.transpose(0, 1).unsqueeze(0) for t in (q_i, k_i, v_i))
            part = F.scaled_dot_product_attention(*heads_first, dropout_p=dropout_p, scale=scale)
            parts.append(part.squeeze(0).transpose(0, 1))
    return torch.cat(parts) if parts else q.new_zeros(q.shape)


def _padded_in_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    if k.shape[2] == 0:
        return q.new_zeros(q.shape)
    mask = bias
    if key_mask is not None:
        keep = key_mask[:, None, None, :]
        mask = keep if bias is None else bias.masked_fill(~keep, -math.inf)
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout_p, scale=scale)
    if mask is None:
        return out
    alone = ~mask.any(-1) if mask.dtype == torch.bool else (mask == -math.inf).all(-1)
    return out.masked_fill(alone.unsqueeze(-1), 0.0)
