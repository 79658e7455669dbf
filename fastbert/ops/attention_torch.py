"""Attention in torch's operations: what runs where the kernels do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import PackedBatch
from . import onednn_attention
from .backend import watched
from .gradient import wants_gradient

__all__ = ["NOT_READ", "padded_in_torch", "varlen_in_torch", "way_of_one"]

# Tokens of a sequence up to which two products and a softmax in between are faster than SDPA in
# fp32, where oneDNN's graph (`onednn_attention`) does not take it. With a bias on two EPYC cores
# with AVX-512 0.4 to 0.9 of its time, with AVX2 0.4 to 0.6, on one core and for sequences of one
# length together as well (12 heads of 32 and 64; a whole MPNet of MiniLM's size takes 0.53 to
# 0.98). Without one where a sequence is alone in its length: 0.6 to 0.85 on AVX-512, a whole MiniLM
# 0.95 to 0.98 and base 0.98 to 1.00 (AVX2: 0.97 to 1.00), of one text or of a ragged batch. Batches
# of one length would take 0.99 to 1.06.
_BIASED_UP_TO = 512
_ALONE_UP_TO = 192
NOT_READ = torch.zeros((), dtype=torch.float32, device="cpu")  # what baddbmm adds with beta=0


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
    one_by_one: bool = False,
) -> Tensor:
    """SDPA over runs of equally long neighbours: views of the packed rows, one copy at the end.

    One copy in the gradient too: that of a slice would be all rows for every run.

    Args:
        one_by_one: in inference each sequence may run by itself, where there is a `way_of_one`.
            Without a bias a short one's bits are then not those beside another one of its length.
    """
    if q.numel() == 0:  # with a gradient, which is nothing for q and zeros for k and v
        return q + k[:0].sum() + v[:0].sum()
    if keys is not batch and keys.lengths != batch.lengths:
        return _cross_in_torch(q, k, v, batch, keys, scale, dropout_p, unfused)
    parts = []
    runs = batch.runs()
    rows = (t.split([count * length for count, length in runs]) for t in (q, k, v))
    for (count, length), *run in zip(runs, *rows, strict=True):
        attend = way_of_one(run[0], count, length, scale, bias) if one_by_one else None
        if attend is not None:
            each = zip(*(t.split(length) for t in run), strict=True)
            parts += [attend(*one)[:length] for one in each]
            continue
        run = (t.unflatten(0, (count, length)).transpose(1, 2) for t in run)
        mask = None if bias is None else bias[:, :length, :length]
        part = _sdpa(*run, mask, dropout_p, scale, unfused)
        parts.append(part.transpose(1, 2).flatten(0, 1))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)


def way_of_one(
    q: Tensor, count: int, length: int, scale: float, bias: Tensor | None
) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """What attends in one sequence after the other, for inference on a CPU, where that is faster
    than SDPA in all at once, else None.

    Args:
        q: ``[rows, H, D]``, all sequences, or one and rows behind it that may hold anything finite.
        count: sequences that are neighbours.
        length: tokens of each.
        scale: factor for the scores.
        bias: ``[H, length or more, length or more]`` of finite numbers, or None.

    Returns:
        ``q, k, v [rows, H, D] -> [length or more, H, D]``.
    """
    if length == 0 or q.dtype != torch.float32:
        return None
    if bias is None:
        one = q if count == 1 else q[:length]
        function = onednn_attention.prepared(one, length, scale)
        if function is not None:
            return function
    if length <= (_BIASED_UP_TO if bias is not None else _ALONE_UP_TO if count == 1 else 0):
        return partial(_by_products, length, scale, bias)
    return None


def _by_products(
    length: int, scale: float, bias: Tensor | None, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Two products with a softmax in between."""
    if q.shape[0] > length:
        q, k, v = q[:length], k[:length], v[:length]
    q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    scores, beta = (NOT_READ, 0) if bias is None else (bias[:, :length, :length], 1)
    scores = torch.baddbmm(scores, q, k.transpose(1, 2), beta=beta, alpha=scale)
    return torch.bmm(scores.softmax(-1), v).transpose(0, 1)


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
