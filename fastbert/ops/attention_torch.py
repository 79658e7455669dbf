"""Attention in torch's operations: what runs where the kernels do not."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import PackedBatch
from .backend import watched
from .gradient import wants_gradient

__all__ = ["by_products", "padded_in_torch", "takes_products", "varlen_in_torch"]

# Tokens of a sequence up to which two products and a softmax in between are faster than SDPA in
# fp32. With a bias on two EPYC cores with AVX-512 0.4 to 0.9 of its time, with AVX2 0.4 to 0.6, on
# one core and for sequences of one length together as well (12 heads of 32 and 64; a whole MPNet of
# MiniLM's size takes 0.53 to 0.98). Without one where a sequence is alone in its length: 0.6 to
# 0.85 on AVX-512, a whole MiniLM 0.95 to 0.98 and base 0.98 to 1.00 (AVX2: 0.97 to 1.00), of one
# text or of a ragged batch. Batches of one length would take 0.99 to 1.06.
_BIASED_UP_TO = 512
_ALONE_UP_TO = 192
_NOT_READ = torch.zeros((), dtype=torch.float32, device="cpu")  # with beta=0


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
    products: bool = False,
) -> Tensor:
    """SDPA over runs of equally long neighbours: views of the packed rows, one copy at the end.

    One copy in the gradient too: that of a slice would be all rows for every run.

    Args:
        products: sequences may run `by_products` (inference), where `takes_products` says so.
            Without a bias their bits are then not those beside another one of their length.
    """
    if keys is not batch and keys.lengths != batch.lengths:
        return _cross_in_torch(q, k, v, batch, keys, scale, dropout_p, unfused)
    parts = []
    runs = batch.runs()
    rows = (t.split([count * length for count, length in runs]) for t in (q, k, v))
    for (count, length), *run in zip(runs, *rows, strict=True):
        if products and takes_products(q, count, length, bias):
            each = zip(*(t.transpose(0, 1).split(length, 1) for t in run), strict=True)
            parts += [by_products(*one, scale, bias).transpose(0, 1) for one in each]
            continue
        run = (t.unflatten(0, (count, length)).transpose(1, 2) for t in run)
        mask = None if bias is None else bias[:, :length, :length]
        part = _sdpa(*run, mask, dropout_p, scale, unfused)
        parts.append(part.transpose(1, 2).flatten(0, 1))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else q.new_zeros(q.shape)


def takes_products(q: Tensor, count: int, length: int, bias: Tensor | None) -> bool:
    """Whether so many neighbours of one length are faster `by_products`."""
    up_to = _BIASED_UP_TO if bias is not None else _ALONE_UP_TO if count == 1 else 0
    return 0 < length <= up_to and q.dtype == torch.float32


def by_products(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Attention in one sequence as two products with a softmax in between, for inference on a CPU.

    Args:
        q, k, v: fp32 ``[H, S, D]``.
        bias: ``[H, S or more, S or more]`` of finite numbers, or None.

    Returns:
        ``[H, S, D]``.
    """
    length = q.shape[1]
    scores, beta = (_NOT_READ, 0) if bias is None else (bias[:, :length, :length], 1)
    scores = torch.baddbmm(scores, q, k.transpose(1, 2), beta=beta, alpha=scale)
    return torch.bmm(scores.softmax(-1), v)


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
