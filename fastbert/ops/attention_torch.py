"""Attention in torch's operations: what runs where the kernels do not."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import PackedBatch
from .backend import watched
from .gradient import wants_gradient

__all__ = ["padded_in_torch", "takes_products", "varlen_in_torch"]

# Tokens of a sequence up to which two products and a softmax in between are faster than SDPA in
# fp32. With a bias on two EPYC cores with AVX-512 0.4 to 0.9 of its time, with AVX2 0.4 to 0.6, on
# one core and for sequences of one length together as well (12 heads of 32 and 64; a whole MPNet of
# MiniLM's size takes 0.53 to 0.98). Without one where a sequence is alone in its length: ragged
# batches of MiniLM take 0.96 of their time so, those of base 1.00, and batches of one length 0.99
# to 1.06.
_BIASED_UP_TO = 512
_ALONE_UP_TO = 128


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    scale: float,
    unfused: bool,
) -> Tensor:
    # With dropout also where nobody wants a gradient yet: activation checkpointing computes it
    # again with one, and the same numbers must be drawn in the same way.
    twice = unfused and (dropout_p > 0.0 or wants_gradient(q, k, v, mask))
    if (twice and not torch.compiler.is_compiling()) or watched():
        # The context manager that chooses this for SDPA is for the whole process, not for a call.
        if mask is not None and mask.dtype == torch.bool:  # which it would add
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
        math_attention = torch.ops.aten._scaled_dot_product_attention_math
        # Its softmax would be in fp32 under autocast, and has no gradient for bf16 then.
        with torch.autocast(q.device.type, enabled=False):
            return math_attention(q, k, v, mask, dropout_p=dropout_p, scale=scale)[0]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout_p, scale=scale)


def varlen_in_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: PackedBatch,
    keys: PackedBatch,
    scale: float,
    dropout_p: float,
    unfused: bool,
    bias: Tensor | None = None,
    by_products: bool = False,
) -> Tensor:
    """SDPA over runs of equally long neighbours: views of the packed rows, one copy at the end.

    One copy in the gradient too: that of a slice would be all rows for every run.

    Args:
        by_products: sequences may be two products and a softmax (`takes_products`), in inference.
            Without a bias their bits are then not those beside another one of their length.
    """
    if keys is not batch and keys.lengths != batch.lengths:
        return _cross_in_torch(q, k, v, batch, keys, scale, dropout_p, unfused)
    parts = []
    runs = batch.runs()
    rows = (t.split([count * length for count, length in runs]) for t in (q, k, v))
    for (count, length), *run in zip(runs, *rows, strict=True):
        if by_products and takes_products(q, count, length, bias):
            each = zip(*(t.split(length) for t in run), strict=True)
            parts += [_sequence_by_products(*one, scale, bias) for one in each]
            continue
        run = (t.unflatten(0, (count, length)).transpose(1, 2) for t in run)
        mask = None if bias is None else bias[:, :length, :length]
        part = _sdpa(*run, mask, dropout_p, scale, unfused)
        parts.append(part.transpose(1, 2).flatten(0, 1))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else q.new_zeros(q.shape)


def takes_products(q: Tensor, count: int, length: int, bias: Tensor | None) -> bool:
    """Whether `varlen_in_torch` may compute so many neighbours of one length by products."""
    up_to = _BIASED_UP_TO if bias is not None else _ALONE_UP_TO if count == 1 else 0
    return 0 < length <= up_to and q.dtype == torch.float32


def _sequence_by_products(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None
) -> Tensor:
    """Attention in one sequence, ``[S, H, D]`` each, in inference; a bias ``[H, S or more, ...]``
    of finite numbers."""
    length, heads, _ = q.shape
    if bias is None:
        scores, beta = q.new_zeros(()).expand(heads, length, length), 0  # which is not read then
    else:
        scores, beta = bias[:, :length, :length], 1
    scores = torch.baddbmm(scores, q.transpose(0, 1), k.permute(1, 2, 0), beta=beta, alpha=scale)
    return torch.bmm(scores.softmax(-1), v.transpose(0, 1)).transpose(0, 1)


def _cross_in_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: PackedBatch,
    keys: PackedBatch,
    scale: float,
    dropout_p: float,
    unfused: bool,
) -> Tensor:
    parts = []
    rows = zip(q.split(batch.lengths), k.split(keys.lengths), v.split(keys.lengths), strict=True)
    for q_i, k_i, v_i in rows:
        if k_i.shape[0] == 0:
            parts.append(q_i.new_zeros(q_i.shape))
        elif q_i.shape[0]:
            heads_first = (t.transpose(0, 1).unsqueeze(0) for t in (q_i, k_i, v_i))
            part = _sdpa(*heads_first, None, dropout_p, scale, unfused)
            parts.append(part.squeeze(0).transpose(0, 1))
    return torch.cat(parts) if parts else q.new_zeros(q.shape)


def padded_in_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    dropout_p: float,
    unfused: bool,
) -> Tensor:
    if k.shape[2] == 0:
        return q.new_zeros(q.shape)
    mask = bias
    if key_mask is not None:
        keep = key_mask[:, None, None, :]
        mask = keep if bias is None else bias.masked_fill(~keep, -math.inf)
    out = _sdpa(q, k, v, mask, dropout_p, scale, unfused)
    if mask is None:
        return out
    alone = ~mask.any(-1) if mask.dtype == torch.bool else (mask == -math.inf).all(-1)
    return out.masked_fill(alone.unsqueeze(-1), 0.0)
