"""The matrix that attention never builds, for callers who ask to see it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import PackedBatch, PaddedBatch
from .attention import backend_of
from .dropout import dropout_seed
from .softmax import softmax

__all__ = ["attention_weights"]


def attention_weights(
    q: Tensor,
    k: Tensor,
    batch: PackedBatch | PaddedBatch,
    *,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """What attention multiplies the values with, after dropout.

    Args:
        q, k: rows ``[T, H, D]`` of the batch.
        batch: where the sequences are.
        scale: factor for the scores.
        dropout_p: probability of dropping a weight; the weights that are dropped, and what is taken
            from torch's generator for it, are those of `attention` and `attention_varlen` in the
            same place.
        seed: as of these. Kernels only.

    Returns:
        ``[B, H, S, S]`` over the padded batch; zeros between different sequences and, in a
        `PackedBatch`, where a query or a key is padding.
    """
    packed = isinstance(batch, PackedBatch)
    pad = batch.unpack if packed else batch.view
    padded_q, padded_k = (pad(t).transpose(1, 2) for t in (q, k))
    if packed:
        sequences, places = batch.places()
        which = batch.unpack(sequences, fill=-1)
        mask = (which[:, None, :, None] == which[:, None, None, :]) & (which >= 0)[:, None, None]
        if batch.bias is not None:
            at = batch.unpack(places)
            bias = batch.bias[:, at[:, :, None], at[:, None, :]].transpose(0, 1)
            mask = bias.masked_fill(~mask, -math.inf)
    else:
        mask = batch.bias
        if batch.key_mask is not None:
            keep = batch.key_mask[:, None, None, :]
            mask = keep if mask is None else mask.masked_fill(~keep, -math.inf)
    weights = softmax(padded_q @ padded_k.transpose(-1, -2), mask=mask, scale=scale)
    if dropout_p == 0.0:
        return weights
    if torch.compiler.is_compiling():
        return F.dropout(weights, dropout_p)
    return weights * _kept(q, batch, dropout_p, seed)


def _kept(q: Tensor, batch: PackedBatch | PaddedBatch, p: float, seed: Tensor | None) -> Tensor:
    """The factors of dropout, ``[B, H, S, S]``."""
    heads = q.shape[1]
    packed = isinstance(batch, PackedBatch)
    size, length = batch.padded_shape
    longest = batch.max_seqlen if packed else length
    if backend_of(q, p, longest) == "triton":
        from ..kernels._dropout import scores_kept

        number = int(dropout_seed(q.device) if seed is None else seed)
        count = batch.num_sequences if packed else size
        factors = list(scores_kept(number, count, heads, longest, longest, p).to(q))
    elif packed:
        drawn = [F.dropout(q.new_ones(n, heads, run, run), p) for n, run in batch.runs()]
        of_real = iter([factor for run in drawn for factor in run])
        factors = [next(of_real) if n else None for n in batch.lengths]
    else:
        return F.dropout(q.new_ones(size, heads, length, length), p)
    if not packed:
        return torch.stack(factors)
    kept = q.new_zeros(size, heads, length, length)
    slots = torch.arange(q.shape[0], device=q.device) if batch.indices is None else batch.indices
    for of_sequence, factor in zip(slots.split(batch.lengths), factors, strict=True):
        n = of_sequence.shape[0]
        if n:
            columns = of_sequence % length
            row = int(of_sequence[0]) // length
            kept[row][:, columns[:, None], columns] = factor[:, :n, :n]
    return kept
