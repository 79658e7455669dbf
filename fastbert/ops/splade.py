"""SPLADE's vectors: how much each word of the vocabulary matters in a text.

A masked-LM head's logits are turned into weights, ``log(1 + relu(logit))``, and pooled over the
tokens of each sequence (Formal et al., 2107.05720 with sums, 2109.10086 with maxima). Logits never
exist as one tensor ``[T, V]``: they are made for some sequences and some words, pooled, and gone.
The weight rises with the logit, so that the largest logit can be looked for, and be turned into a
weight alone; of all others backward needs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import PackedBatch
from .gradient import wants_gradient
from .linear import check_decoder, linear
from .reference import splade_ref

__all__ = ["ACTIVATIONS", "POOLINGS", "linear_splade"]

POOLINGS = ("max", "sum")
ACTIVATIONS = ("relu", "log1p_relu")
# Logits at a time: on a CPU what stays in its cache, on a GPU enough that launches cost nothing.
_LOGITS = {"cpu": 2**21}
_LOGITS_ELSEWHERE = 2**26
_COLUMNS = 256  # words at a time, at least: a product of fewer is slower


class _Part(NamedTuple):
    """Neighbouring sequences.

    Attributes:
        rows, sequences: which, in the batch.
        runs: ``(first row of the part, first sequence of it, how many, their length)``.
    """

    rows: slice
    sequences: slice
    runs: list[tuple[int, int, int, int]]


def linear_splade(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    batch: PackedBatch,
    *,
    pooling: str = "max",
    activation: str = "relu",
) -> Tensor:
    """``log(1 + relu(x @ weight.T + bias))``, pooled over each sequence.

    Args:
        x: ``[T, E]``, what enters the decoder, without padding.
        weight, bias: ``[V, E]`` and ``[V]`` or None, the decoder.
        batch: the sequences of ``x``.
        pooling: ``"max"`` or ``"sum"`` over the tokens of a sequence.
        activation: ``"relu"``, or ``"log1p_relu"`` for ``log(1 + log(1 + relu(.)))`` (2504.14839).

    Returns:
        ``[B, V]``, in the dtype of ``x``, or autocast's; zeros for a sequence without tokens.

    Raises:
        ValueError: shapes that do not fit, an unknown pooling or activation.

    Supported: fp32, fp16, bf16, fp64, gradients of any order, autocast. Where several tokens have
    the largest logit, one of them gets the gradient, as in ``torch.max(dim=...)``.
    """
    check_decoder("linear_splade", x, weight, bias)
    if x.shape[0] != batch.num_tokens:
        raise ValueError(
            f"linear_splade: expected {batch.num_tokens} rows for {batch.num_sequences} sequences, "
            f"got {x.shape[0]}"
        )
    for name, value, known in (
        ("pooling", pooling, POOLINGS),
        ("activation", activation, ACTIVATIONS),
    ):
        if value not in known:
            raise ValueError(f"linear_splade: expected {name} {' or '.join(known)}, got {value!r}")
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    parts = list(_parts(batch, weight.shape[0], device))
    twice = activation == "log1p_relu"
    with torch.autocast(device, enabled=False):
        if wants_gradient(x, weight, bias):
            return _LinearSplade.apply(x, weight, bias, parts, batch, pooling, twice, dtype)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        return _pooled(x, weight, bias, parts, batch, pooling, twice, None)


def _parts(batch: PackedBatch, words: int, device: str) -> Iterator[_Part]:
    """Sequences that are pooled together: on a GPU as many as leave room for all words at once, so
    that each sequence takes one launch and not one for some words."""
    most = batch.num_tokens if device == "cpu" else max(_LOGITS_ELSEWHERE // words, 1)
    row = sequence = 0
    first_row, first, runs = 0, 0, []
    for length in batch.lengths:
        if runs and row + length - first_row > most:
            yield _Part(slice(first_row, row), slice(first, sequence), runs)
            first_row, first, runs = row, sequence, []
        last = runs[-1] if runs else None
        if length and last and last[3] == length and last[1] + last[2] == sequence - first:
            runs[-1] = (*last[:2], last[2] + 1, length)
        elif length:
            runs.append((row - first_row, sequence - first, 1, length))
        row, sequence = row + length, sequence + 1
    if runs:
        yield _Part(slice(first_row, row), slice(first, sequence), runs)


def _chunks(part: _Part, words: int, device: str) -> Iterator[slice]:
    """Words whose logits for a part are made together."""
    rows = part.rows.stop - part.rows.start
    columns = max(_LOGITS.get(device, _LOGITS_ELSEWHERE) // rows, _COLUMNS)
    for start in range(0, words, columns):
        yield slice(start, min(start + columns, words))


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, words: slice) -> Tensor:
    return linear(rows, weight[words], None if bias is None else bias[words])


def _weights_(logits: Tensor, twice: bool) -> Tensor:
    """Weights of logits, in their place."""
    weights = logits.relu_().log1p_()
    return weights.log1p_() if twice else weights


def _slopes_(logits: Tensor, twice: bool) -> Tensor:
    """The derivative of weights by logits, in their place."""
    dead = logits <= 0
    slopes = (1 + logits.relu_()).reciprocal_()
    if twice:  # log1p(relu) is -log(slope)
        slopes.div_(1 - slopes.log())
    return slopes.masked_fill_(dead, 0)


def _pooled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    parts: list[_Part],
    batch: PackedBatch,
    pooling: str,
    twice: bool,
    where: Tensor | None,
) -> Tensor:
    """The vectors; with ``where``, int32 ``[B, V]``, the largest logits instead, and in it the row
    that each is of."""
    out = x.new_zeros(batch.num_sequences, weight.shape[0])
    for part in parts:
        rows = x[part.rows]
        for words in _chunks(part, weight.shape[0], x.device.type):
            logits = _logits(rows, weight, bias, words)
            if pooling == "sum":
                logits = _weights_(logits, twice)
            target = out[part.sequences, words]
            for row, sequence, count, length in part.runs:
                each = logits[row : row + count * length].unflatten(0, (count, length))
                own = target[sequence : sequence + count]
                if pooling == "sum":
                    own.copy_(each.sum(1))
                elif where is None:
                    own.copy_(_weights_(each.amax(1), twice))
                else:
                    largest, place = each.max(1)
                    own.copy_(largest)
                    starts = torch.arange(count, device=x.device)[:, None] * length + row
                    found = where[part.sequences, words][sequence : sequence + count]
                    found.copy_(place + (starts + part.rows.start))
    return out


class _LinearSplade(torch.autograd.Function):
    """Backward makes the gradient of some logits at a time; of maxima it knows them, for sums it
    makes the logits again."""

    @staticmethod
    def forward(ctx, x, weight, bias, parts, batch, pooling, twice, dtype):
        ctx.settings = parts, batch, pooling, twice, dtype
        where = top = None
        if pooling == "max":
            shape = batch.num_sequences, weight.shape[0]
            where = torch.zeros(shape, dtype=torch.int32, device=x.device)
        cast = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        out = _pooled(*cast, parts, batch, pooling, twice, where)
        if pooling == "max":
            top = out
            out = _weights_(top.clone(), twice)
        ctx.save_for_backward(x, weight, bias, top, where)
        return out

    @staticmethod
    def backward(ctx, upstream):
        *inputs, top, where = ctx.saved_tensors
        parts, batch, pooling, twice, dtype = ctx.settings
        if torch.is_grad_enabled():  # create_graph=True: by the plain formula, once more
            return *_to_differentiate(inputs, ctx, upstream), None, None, None, None, None
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        x, weight, bias = (None if t is None else t.to(dtype) for t in inputs)
        wide = torch.promote_types(dtype, torch.float32)
        dx = x.new_zeros(x.shape, dtype=wide) if need_x else None
        dweight = weight.new_zeros(weight.shape, dtype=wide) if need_weight else None
        dbias = weight.new_zeros(weight.shape[0], dtype=wide) if need_bias else None
        for part in parts:
            rows = x[part.rows]
            for words in _chunks(part, weight.shape[0], x.device.type):
                own = upstream[part.sequences, words].to(dtype)
                if pooling == "max":
                    own = own * _slopes_(top[part.sequences, words].clone(), twice)
                    at = where[part.sequences, words].long() - part.rows.start
                    full = [i for i, n in enumerate(batch.lengths[part.sequences]) if n]
                    if len(full) < own.shape[0]:
                        own, at = own[full], at[full]
                    g = rows.new_zeros(rows.shape[0], own.shape[1]).scatter_(0, at, own)
                else:
                    g = _slopes_(_logits(rows, weight, bias, words), twice)
                    for row, sequence, count, length in part.runs:
                        each = g[row : row + count * length].unflatten(0, (count, length))
                        each.mul_(own[sequence : sequence + count, None])
                if need_x:
                    dx[part.rows] += g @ weight[words]
                if need_weight:
                    dweight[words] += g.t() @ rows
                if need_bias:
                    dbias[words] += g.sum(0, dtype=wide)
        found = (
            None if g is None else g.to(t.dtype)
            for g, t in zip((dx, dweight, dbias), inputs, strict=True)
        )
        return *found, None, None, None, None, None


def _to_differentiate(inputs: list[Tensor | None], ctx, upstream: Tensor) -> list[Tensor | None]:
    _, batch, pooling, twice, dtype = ctx.settings
    x, weight, bias = (None if t is None else t.to(dtype) for t in inputs)
    activation = ACTIVATIONS[1] if twice else ACTIVATIONS[0]
    pooled = splade_ref(F.linear(x, weight, bias), batch.lengths, pooling, activation)
    wanted = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
    grads = iter(torch.autograd.grad(pooled, wanted, upstream, create_graph=True))
    return [next(grads) if need else None for need in ctx.needs_input_grad[:3]]
