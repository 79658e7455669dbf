"""Bidirectional attention, over packed sequences or a padded batch.

Both forms never build the matrix of scores (Dao et al., 2205.14135; Milakov and Gimelshein,
1805.02867, for the online softmax). The packed form reads q, k and v with whatever strides they
have, so that they may be views of one projection ``[T, 3, H, D]``.
"""

from __future__ import annotations

import math
from operator import is_

import torch
from torch import Tensor

from ..packing import PackedBatch
from .attention_kernels import (
    MAX_DROPOUT_LENGTH,
    MAX_HEAD_SIZE,
    attention_padded,
    attention_padded_bwd,
    run_varlen,
    run_varlen_bwd,
)
from .attention_torch import padded_in_torch, varlen_in_torch
from .backend import forced, resolve
from .dropout import check_dropout, dropout_seed
from .gradient import first_order_only, refuse_seed, rows_contiguous, wants_gradient

__all__ = ["attention", "attention_qkv", "attention_varlen", "backend_of"]

# How far the level of a row of the bias may be from zero: from here its sum's logarithm loses more
# than its last bits, from here nothing is left of the scores in fp64 either, and what says so.
_FAR, _DROWNED, _ALIKE = 64.0, 2.0**60, 2.0**100


class _AttentionVarlen(torch.autograd.Function):
    """q, k and v, or one tensor ``[T, 3, H, D]`` of all three, which then gets one gradient."""

    @staticmethod
    def forward(ctx, batch, keys, scale, dropout_p, seed, bias, *tensors):
        q, k, v = tensors if len(tensors) == 3 else tensors[0].unbind(1)
        out, lse = run_varlen(q, k, v, batch, keys, scale, dropout_p, seed, bias)
        ctx.save_for_backward(*tensors, out, lse, seed, bias)
        ctx.batch, ctx.keys, ctx.scale, ctx.dropout_p = batch, keys, scale, dropout_p
        return out

    @staticmethod
    @first_order_only
    def backward(ctx, do: Tensor):
        *tensors, out, lse, seed, bias = ctx.saved_tensors
        fused, wanted = len(tensors) == 1, ctx.needs_input_grad[5]
        q, k, v = tensors[0].unbind(1) if fused else tensors
        *gradients, dbias = run_varlen_bwd(
            rows_contiguous(do), q, k, v, out, lse, ctx.batch, ctx.keys, ctx.scale, ctx.dropout_p,
            seed, fused, bias, wanted,
        )  # fmt: skip
        dbias = dbias.to(bias.dtype) if wanted else None
        return *(None,) * 5, dbias, *(gradients[:1] if fused else gradients)


class _AttentionPadded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, key_mask, bias, leveled, scale, dropout_p, seed):
        kept, share = _leveled(bias, key_mask) if leveled is None else leveled
        full = _full(kept, q, k)
        out, lse = attention_padded(q, k, v, key_mask, full, scale, dropout_p, seed, True)
        ctx.save_for_backward(q, k, v, out, lse, key_mask, kept, share, seed)
        ctx.scale, ctx.dropout_p = scale, dropout_p
        ctx.bias_shape = None if bias is None else bias.shape
        return out

    @staticmethod
    @first_order_only
    def backward(ctx, do: Tensor):
        q, k, v, out, lse, key_mask, bias, share, seed = ctx.saved_tensors
        do = do if share is None else do * share.to(do.dtype)
        wanted = ctx.needs_input_grad[4]
        dq, dk, dv, dbias = attention_padded_bwd(
            rows_contiguous(do), q, k, v, out, lse, key_mask, _full(bias, q, k), ctx.scale,
            ctx.dropout_p, seed, wanted,
        )  # fmt: skip
        dbias = dbias.sum_to_size(ctx.bias_shape).to(bias.dtype) if wanted else None
        return dq, dk, dv, None, dbias, None, None, None, None


def _leveled(bias: Tensor | None, key_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A bias for the kernels, none of whose rows is far from zero as a whole, and what backward has
    to multiply the upstream gradient by.

    A row of -10000 masks nothing: softmax does not see a shift of a row, but the logarithm of its
    sum, from which backward makes the weights, would lose its last digits. In a row of finfo.min
    the scores drown: its best keys are alike, and ``bias * log2(e)`` would overflow. They get one
    number that the scores drown in as well. It absorbs the logarithm of the row's sum too, so that
    in backward every weight is 1 in place of 1 / n; what backward makes is linear in the upstream
    gradient, which is divided by n instead.
    """
    if bias is None or bias.shape[-1] == 0:
        return bias, None
    seen = bias
    if key_mask is not None:
        seen = bias.masked_fill(~key_mask[:, None, None, :], -math.inf)
    level = seen.amax(-1, keepdim=True)
    finite, distance = level.isfinite(), level.abs()
    drowned = (distance > _DROWNED) & finite
    best = seen == level
    others = bias - torch.where((distance > _FAR) & finite & ~drowned, level, 0.0)
    alike = torch.where(best, _ALIKE, -math.inf).to(bias.dtype)
    share = torch.where(drowned, 1.0 / best.sum(-1, keepdim=True).clamp_min(1), 1.0)
    return rows_contiguous(torch.where(drowned, alike, others)), share  # or it is copied twice


def _leveled_once(
    bias: Tensor | None, key_mask: Tensor | None, shared: dict
) -> tuple[Tensor | None, Tensor | None]:
    """`_leveled`, which is 25 operations, most of them of the size of the bias, unless ``shared``
    has it of these very tensors as they are."""
    given = (bias, key_mask)
    versions = [None if t is None or t.is_inference() else t._version for t in given]
    of, at, leveled = shared.get("leveled", (given, None, None))
    if at != versions or not all(map(is_, of, given)):
        leveled = _leveled(bias, key_mask)
        shared["leveled"] = given, versions, leveled
    return leveled


def _full(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if bias is None else bias.expand(*q.shape[:3], k.shape[2])


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: PackedBatch,
    *,
    key_batch: PackedBatch | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    unfused: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """``softmax(q @ k.T * scale) @ v`` within each sequence of a packed batch, no padding anywhere.

    Args:
        q: ``[Tq, H, D]``, any strides with a last one of 1.
        k, v: ``[Tk, H, D]``, the same.
        batch: the sequences of ``q``, and of ``k`` and ``v`` unless ``key_batch`` is given.
        key_batch: the sequences of ``k`` and ``v`` where they differ (cross-attention); as many.
        scale: factor for the scores, ``D ** -0.5`` if None.
        dropout_p: probability of dropping an attention weight.
        seed: from `fastbert.ops.dropout_seed`, for a mask that can be had again; drawn if None.
            Kernels only.
        unfused: in torch, use operations that have second derivatives; the matrix of scores is then
            kept for backward.
        bias: ``[H, S, S]``, added to the scaled scores of every sequence, by places in it; S is the
            longest one's length; the kernels copy one whose last stride is not 1. Numbers as a
            model learns them, and ``-inf``: gradients of the kernels lose digits where all that a
            query sees is far beyond 64, and below -2^120 it sees nothing. Masks are for
            `attention`.

    Returns:
        ``[Tq, H, D]``, contiguous. A query whose sequence has no keys gives zeros. Neighbours
        change no bit of the kernels' results, nor of gradients of q, k and v: what runs for a
        sequence follows from its own length. (Which weights are dropped follows from its number.)

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other or the batch.
        NotImplementedError: with the Triton backend forced, a head size over 128; with torch, a
        seed.

    Supported: fp32, fp16, bf16 (fp64 in torch), head sizes up to 128 (any in torch), gradients
    (first order with the kernels). Larger heads run in torch unless the Triton backend is forced.
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
    _check_bias("attention_varlen", bias, q, batch, keys)
    check_dropout("attention_varlen", dropout_p, seed, q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend_of(q, dropout_p, max(batch.max_seqlen, keys.max_seqlen)) == "torch" or (
        q.numel() == 0
    ):
        refuse_seed("attention_varlen", seed)
        return varlen_in_torch(q, k, v, batch, keys, scale, dropout_p, unfused, bias)
    q, scale = _positive(q, scale)
    return _differentiable(batch, keys, scale, dropout_p, seed, bias, q, k, v)


def attention_qkv(
    qkv: Tensor,
    batch: PackedBatch,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    unfused: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """`attention_varlen` of one projection, whose gradient is one tensor too and needs no copy.

    Args:
        qkv: ``[T, 3, H, D]``, q, k and v of every token.
        batch: the sequences.
        scale, dropout_p, seed, unfused, bias: as in `attention_varlen`.

    Returns:
        ``[T, H, D]``, contiguous.

    Raises:
        ValueError, NotImplementedError: as `attention_varlen`.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"attention_qkv: expected [T, 3, H, D], got {tuple(qkv.shape)}")
    q, k, v = qkv.unbind(1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if (
        scale <= 0
        or qkv.numel() == 0
        or qkv.stride(-1) != 1
        or qkv.shape[0] != batch.num_tokens
        or backend_of(qkv, dropout_p, batch.max_seqlen) == "torch"
    ):
        return attention_varlen(
            q, k, v, batch, scale=scale, dropout_p=dropout_p, seed=seed, unfused=unfused, bias=bias
        )
    _check_bias("attention_qkv", bias, q, batch, batch)
    check_dropout("attention_qkv", dropout_p, seed, qkv.device)
    return _differentiable(batch, batch, scale, dropout_p, seed, bias, qkv)


def _check_bias(
    op: str, bias: Tensor | None, q: Tensor, batch: PackedBatch, keys: PackedBatch
) -> None:
    if bias is not None and (
        keys is not batch or bias.shape != (q.shape[1], batch.max_seqlen, batch.max_seqlen)
    ):
        raise ValueError(
            f"{op}: expected a bias {(q.shape[1], *[batch.max_seqlen] * 2)} and no key_batch, "
            f"got {tuple(bias.shape)}"
        )


def _differentiable(
    batch: PackedBatch,
    keys: PackedBatch,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    bias: Tensor | None,
    *tensors: Tensor,
) -> Tensor:
    if dropout_p > 0.0 and seed is None:
        seed = dropout_seed(tensors[0].device)
    if wants_gradient(bias, *tensors):
        return _AttentionVarlen.apply(batch, keys, scale, dropout_p, seed, bias, *tensors)
    q, k, v = tensors if len(tensors) == 3 else tensors[0].unbind(1)
    # With dropout what training has compiled serves.
    return run_varlen(q, k, v, batch, keys, scale, dropout_p, seed, bias, dropout_p > 0.0)[0]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    unfused: bool = False,
    shared: dict | None = None,
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
        seed: from `fastbert.ops.dropout_seed`, for a mask that can be had again; drawn if None.
            Kernels only.
        unfused: in torch, use operations that have second derivatives; the matrix of scores is then
            kept for backward.
        shared: a dict that calls with the same key_mask and bias share, as those of a model's
            layers do: the first one keeps there what follows from these alone. Not for
            torch.compile.

    Returns:
        ``[B, H, Sq, D]``, a transposed view of a contiguous ``[B, Sq, H, D]``. A query that may
        attend to no key gives zeros.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        NotImplementedError: with the Triton backend forced, a head size over 128; with torch, a
        seed.

    Supported: fp32, fp16, bf16 (fp64 in torch), head sizes up to 128 (any in torch), gradients for
    q, k, v and bias (first order with the kernels). Larger heads run in torch unless the Triton
    backend is forced.
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
        shape = (batch_size, num_heads, len_q, len_k)
        try:
            fits = torch.broadcast_shapes(bias.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"attention: expected a bias that broadcasts to {shape}, got {tuple(bias.shape)}"
            )
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill_(~bias, -math.inf)
    check_dropout("attention", dropout_p, seed, q.device)
    scale = head_size**-0.5 if scale is None else scale
    if backend_of(q, dropout_p, max(len_q, len_k)) == "torch" or q.numel() == 0:
        refuse_seed("attention", seed)
        return padded_in_torch(q, k, v, key_mask, bias, scale, dropout_p, unfused)
    q, scale = _positive(q, scale)
    if dropout_p > 0.0 and seed is None:
        seed = dropout_seed(q.device)
    leveled = None
    if shared is not None and not wants_gradient(bias):
        leveled = _leveled_once(bias, key_mask, shared)
    if wants_gradient(q, k, v, bias):
        return _AttentionPadded.apply(q, k, v, key_mask, bias, leveled, scale, dropout_p, seed)
    full = _full((leveled or _leveled(bias, key_mask))[0], q, k)
    return attention_padded(q, k, v, key_mask, full, scale, dropout_p, seed, dropout_p > 0.0)[0]


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


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores with a positive scale, which the kernels need."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0.0, 1.0)


def backend_of(q: Tensor, dropout_p: float, max_seqlen: int) -> str:
    """The backend of attention: what the kernels do not cover runs in torch, unless they are
    forced."""
    chosen = resolve(q.device, q.dtype)
    if chosen == "torch":
        return chosen
    gap = None
    if q.shape[-1] > MAX_HEAD_SIZE:
        gap = f"head sizes up to {MAX_HEAD_SIZE}, got {q.shape[-1]}"
    elif dropout_p > 0.0 and max_seqlen > MAX_DROPOUT_LENGTH:
        gap = f"dropout in sequences of up to {MAX_DROPOUT_LENGTH} tokens, got {max_seqlen}"
    if gap is None:
        return chosen
    if forced() == "triton":
        raise NotImplementedError(
            f"attention: the Triton kernels support {gap}; leave the backend open or choose 'torch'"
        )
    return "torch"
