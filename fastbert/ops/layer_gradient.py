"""A BERT layer for training on the kernels as one autograd function, and each of its two halves.

Autograd calls Python for every function, forward and backward, and adds up the gradients of a
residual in passes of their own. A layer that is one function is two calls, its products add to what
has come through the residual, and what it keeps for backward is what `fastbert.ops.linear_gradient`
and `fastbert.ops.recompute` keep: no result of a norm or of an activation. The halves are for
layers of which one half is somebody else's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import PackedBatch
from .attention_kernels import MAX_DROPOUT_LENGTH, MAX_HEAD_SIZE, run_varlen, run_varlen_bwd
from .dropout import dropout_seed
from .gradient import first_order_only, one_dtype, trains_on_kernels
from .layernorm import layer_norm_bwd, layer_norm_fwd, norm_dtype
from .linear_gradient import activation_bwd, activation_fwd, compute_dtype, split_gradient
from .recompute import kept, remade, remember
from .repeated import Repeats, Run, once

__all__ = [
    "attention_half", "feed_forward_half", "of_one_dtype", "takes_attention_half", "whole_layer",
]  # fmt: skip

# Gradients of a half's x and of its tensors, or None.
_Gradients = list[Tensor | None]


def _as(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype is dtype else t.to(dtype)


def _for_backward(parts: tuple[Tensor, ...], joined: Tensor) -> tuple[Tensor | None, ...]:
    """What is kept of weights that were joined: themselves, to be joined again, since they are kept
    anyway; or what was made of them where that took a conversion, as autocast does."""
    return parts if parts[0].dtype == joined.dtype else (joined, None, None)


def _add_product_(residual: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` on top of what came through the residual, in its memory."""
    if residual.dtype == a.dtype:
        return residual.addmm_(a, b)
    return residual.add_(a @ b)


class _Attention(NamedTuple):
    """The first half but for its tensors, which are weights and biases of q, k and v, the weight
    and bias of the projection, those of the norm, and the bias of the scores."""

    batch: PackedBatch
    head_size: int
    scale: float
    attention_p: float
    eps: float
    dropout_p: float
    out_dtype: torch.dtype


class _FeedForward(NamedTuple):
    """The second half but for its tensors, which are weight and bias of both products and of the
    norm."""

    activation: str
    recompute: bool
    eps: float
    dropout_p: float
    out_dtype: torch.dtype


class _Kept(NamedTuple):
    """What backward has to know of a half beside the tensors that are saved.

    Attributes:
        half: what was computed.
        dtype, x_dtype: of the products; of x.
        dtypes: of the half's tensors.
        parts: rows of the weights of q, k and v.
    """

    half: Any
    dtype: torch.dtype
    x_dtype: torch.dtype
    dtypes: list[torch.dtype | None]
    parts: list[int]


def _dtypes(tensors: tuple[Tensor | None, ...]) -> list[torch.dtype | None]:
    return [None if t is None else t.dtype for t in tensors]


def _norm_backward(
    dy: Tensor,
    knows: _Kept,
    z: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    needs: tuple[bool, ...],
    dtypes: tuple[torch.dtype | None, ...],
    run: Run,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The gradients of the product before the norm, of the residual (memory of its own or that of
    the first one) and those of the norm's weight and bias and the product's bias.

    Args:
        needs: whether that of x is wanted, and which of the last three.
        dtypes: of those three.
    """
    needs_x, *of_rows = needs
    d, dresidual, totals = run(
        layer_norm_bwd, dy, z, statistics, weight, knows.dtype,
        knows.x_dtype if needs_x else None, tuple(of_rows), one_dtype(*dtypes),
        knows.half.dropout_p, seed,
    )  # fmt: skip
    total = iter(totals.unbind())
    sums = [
        _as(next(total), dtype) if n else None for n, dtype in zip(of_rows, dtypes, strict=True)
    ]
    return d, d if needs_x and dresidual.numel() == 0 else dresidual, sums


# A half is computed by a function that gives its result, the sum behind it and its statistics, what
# to save, and what else to know; and backward by one that is given these.


def _attention_fwd(x, half: _Attention, seeds, tensors, source, run: Run):
    """``norm(dropout(attention(x) @ w + b) + x)``."""
    weights, biases, (weight, bias, *norm, scores) = tensors[:3], tensors[3:6], tensors[6:]
    dtype = compute_dtype(x)
    joined, weight = _as(torch.cat(weights), dtype), _as(weight, dtype)
    qkv = F.linear(_as(x, dtype), joined, _as(torch.cat(biases), dtype))
    qkv = qkv.view(x.shape[0], 3, -1, half.head_size)
    scores = _as(scores, dtype)
    context, lse = run(
        run_varlen, *qkv.unbind(1), half.batch, half.batch, half.scale, half.attention_p, seeds[0],
        scores,
    )  # fmt: skip
    inner = F.linear(context.flatten(1), weight)
    results = run(
        layer_norm_fwd, inner, *norm, half.eps, x, bias, half.dropout_p, seeds[1], True,
        half.out_dtype,
    )  # fmt: skip
    saved = (
        weight, norm[0], scores, qkv, context, lse, *results[1:], *seeds,
        *_for_backward(weights, joined), *source,
    )  # fmt: skip
    parts = [t.shape[0] for t in weights]
    return results, saved, _Kept(half, dtype, x.dtype, _dtypes(tensors), parts)


def _attention_bwd(
    dy, saved, knows: _Kept, needs: tuple[bool, ...], run: Run, run_source: Run
) -> _Gradients:
    weight, norm_weight, scores, qkv, context, lse, z, statistics, *rest = saved
    attention_seed, seed, wq, wk, wv, *source = rest
    half, dtype, dtypes = knows.half, knows.dtype, knows.dtypes
    need_x, *needs = needs
    d, dx, (dnorm_weight, dnorm_bias, dbias) = _norm_backward(
        dy, knows, z, statistics, norm_weight, seed, (need_x, needs[8], needs[9], needs[7]),
        (dtypes[8], dtypes[9], dtypes[7]), run,
    )  # fmt: skip
    dout = _as(d.t() @ context.flatten(1), dtypes[6]) if needs[6] else None
    dweights = dbiases = (None,) * 3
    dscores = None
    if need_x or any(needs[:6]) or needs[10]:
        dcontext = (d @ weight).view(context.shape)
        dqkv, *_, dscores = run(
            run_varlen_bwd, dcontext, *qkv.unbind(1), context, lse, half.batch, half.batch,
            half.scale, half.attention_p, attention_seed, True, scores, needs[10],
        )  # fmt: skip
        dqkv = dqkv.flatten(1)
        dscores = _as(dscores, dtypes[10]) if needs[10] else None
        if any(needs[:3]):
            dweight = dqkv.t() @ remade(tuple(source), dtype, run_source)
            dweights = split_gradient(dweight, knows.parts, dtypes[:3], needs[:3])
        if any(needs[3:6]):
            dbiases = split_gradient(dqkv.sum(0), knows.parts, dtypes[3:6], needs[3:6])
        if need_x:
            dx = _add_product_(dx, dqkv, wq if wk is None else torch.cat((wq, wk, wv)))
    dx = dx if need_x else None
    return [dx, *dweights, *dbiases, dout, dbias, dnorm_weight, dnorm_bias, dscores]


def _feed_forward_fwd(x, half: _FeedForward, seed, tensors, source, run: Run):
    """``norm(dropout(act(x @ w1 + b1) @ w2 + b2) + x)``."""
    weight_1, bias_1, weight_2, bias_2, norm_weight, norm_bias = tensors
    dtype = compute_dtype(x)
    weight_1, weight_2 = _as(weight_1, dtype), _as(weight_2, dtype)
    pre = F.linear(_as(x, dtype), weight_1, _as(bias_1, dtype))
    inner = F.linear(run(activation_fwd, pre, half.activation), weight_2)
    results = run(
        layer_norm_fwd, inner, norm_weight, norm_bias, half.eps, x, bias_2, half.dropout_p, seed,
        True, half.out_dtype,
    )  # fmt: skip
    saved = (
        weight_1, bias_1, weight_2, norm_weight, None if half.recompute else pre, *results[1:],
        seed, *source,
    )  # fmt: skip
    return results, saved, _Kept(half, dtype, x.dtype, _dtypes(tensors), [])


def _feed_forward_bwd(dy, saved, knows: _Kept, needs: tuple[bool, ...], run: Run) -> _Gradients:
    weight_1, bias_1, weight_2, norm_weight, pre, z, statistics, seed, *source = saved
    half, dtype, dtypes = knows.half, knows.dtype, knows.dtypes
    need_x, *needs = needs
    d, dx, (dnorm_weight, dnorm_bias, dbias_2) = _norm_backward(
        dy, knows, z, statistics, norm_weight, seed, (need_x, needs[4], needs[5], needs[3]),
        (dtypes[4], dtypes[5], dtypes[3]), run,
    )  # fmt: skip
    x = remade(tuple(source), dtype, run) if source else None
    if pre is None:
        pre = F.linear(x, weight_1, _as(bias_1, dtype))
    dpre, h, dbias_1 = run(
        activation_bwd, d @ weight_2, pre, half.activation, dtypes[1] if needs[1] else None,
        needs[2],
    )  # fmt: skip
    # d may be the gradient of the residual too: it is read before that is added to.
    dweight_2 = _as(d.t() @ h, dtypes[2]) if needs[2] else None
    return [
        _add_product_(dx, dpre, weight_1) if need_x else None,
        _as(dpre.t() @ x, dtypes[0]) if needs[0] else None,
        _as(dbias_1, dtypes[1]) if needs[1] else None,
        dweight_2,
        dbias_2,
        dnorm_weight,
        dnorm_bias,
    ]


class _AttentionHalf(torch.autograd.Function):
    """Also gives the sum and its statistics, which have no gradient: they are for `remember`."""

    @staticmethod
    def forward(ctx, x, half, seeds, *tensors):
        source = kept(x) if any(ctx.needs_input_grad[3:6]) else ()
        results, saved, ctx.knows = _attention_fwd(x, half, seeds, tensors, source, once)
        return _saved(ctx, results, saved)

    @staticmethod
    @first_order_only
    def backward(ctx, dy: Tensor | None, *unused):
        if dy is None:
            return (None,) * 14
        need_x, _, _, *needs = ctx.needs_input_grad
        dx, *gradients = _attention_bwd(
            dy, ctx.saved_tensors, ctx.knows, (need_x, *needs), once, once
        )
        return dx, None, None, *gradients


class _FeedForwardHalf(torch.autograd.Function):
    """As `_AttentionHalf`."""

    @staticmethod
    def forward(ctx, x, half, seed, *tensors):
        source = kept(x) if ctx.needs_input_grad[3] or half.recompute else ()
        results, saved, ctx.knows = _feed_forward_fwd(x, half, seed, tensors, source, once)
        return _saved(ctx, results, saved)

    @staticmethod
    @first_order_only
    def backward(ctx, dy: Tensor | None, *unused):
        if dy is None:
            return (None,) * 9
        need_x, _, _, *needs = ctx.needs_input_grad
        dx, *gradients = _feed_forward_bwd(dy, ctx.saved_tensors, ctx.knows, (need_x, *needs), once)
        return dx, None, None, *gradients


class _Layer(torch.autograd.Function):
    """Both halves, as `_AttentionHalf`."""

    @staticmethod
    def forward(ctx, x, attention, feed_forward, seeds, repeats, *tensors):
        needs = ctx.needs_input_grad[5:]
        source = kept(x) if any(needs[:3]) else ()
        ctx.source = _dtypes(source)
        run = repeats.start(x)
        (inner, *norm), saved, first = _attention_fwd(
            x, attention, seeds[:2], tensors[:11], source, run
        )
        source = (*norm, *tensors[8:10]) if needs[11] or feed_forward.recompute else ()
        results, more, second = _feed_forward_fwd(
            inner, feed_forward, seeds[2], tensors[11:], source, run
        )
        ctx.knows, ctx.repeats, ctx.count = (first, second), repeats, len(saved)
        return _saved(ctx, results, saved + more)

    @staticmethod
    @first_order_only
    def backward(ctx, dy: Tensor | None, *unused):
        if dy is None:
            return (None,) * 22
        need_x, _, _, _, _, *needs = ctx.needs_input_grad
        saved, (first, second) = ctx.saved_tensors, ctx.knows
        dy = dy.contiguous()  # as that of every other layer
        run = ctx.repeats.start(dy, need_x, *needs)
        in_first = need_x, *needs[:11]
        dinner, *behind = _feed_forward_bwd(
            dy, saved[ctx.count :], second, (any(in_first), *needs[11:]), run
        )
        before = [None] * 12
        if dinner is not None:
            run_source = ctx.repeats.start(dy, *ctx.source)  # below may be no layer
            before = _attention_bwd(dinner, saved[: ctx.count], first, in_first, run, run_source)
        return before[0], *(None,) * 4, *before[1:], *behind


def _saved(ctx, results: tuple[Tensor, ...], saved: tuple[Tensor | None, ...]):
    ctx.save_for_backward(*saved)
    ctx.mark_non_differentiable(*results[1:])
    ctx.set_materialize_grads(False)  # the sum and its statistics would get zeros of their sizes
    return results


def of_one_dtype(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether nothing has to be converted but what autocast converts."""
    return torch.is_autocast_enabled(x.device.type) or all(
        t is None or (t.dtype == x.dtype and t.device == x.device) for t in tensors
    )


def takes_attention_half(
    x: Tensor, batch: PackedBatch, head_size: int, scale: float, dropout_p: float, *tensors: Tensor
) -> bool:
    """Whether `attention_half` takes these: a gradient is wanted, on kernels that can do them."""
    return (
        trains_on_kernels(x, *tensors)
        and of_one_dtype(x, *tensors)
        and head_size <= MAX_HEAD_SIZE
        and scale > 0
        and (dropout_p == 0.0 or batch.max_seqlen <= MAX_DROPOUT_LENGTH)
    )


def attention_half(
    x: Tensor,
    batch: PackedBatch,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    head_size: int,
    scale: float,
    attention_dropout_p: float,
    eps: float,
    dropout_p: float,
    seeds: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """``LayerNorm(dropout(attention(q, k, v) @ weight.T + bias) + x)``, q, k and v from ``x``
    ``[T, E]`` by three linear layers.

    Args:
        batch: where the sequences are, with a bias of the scores or without.
        seeds: from `fastbert.ops.dropout.dropout_seeds`, for dropout in attention and behind it;
            None where nothing is dropped.
    """
    half = _Attention(batch, head_size, scale, attention_dropout_p, eps, dropout_p, norm_dtype(x))
    y, z, statistics = _AttentionHalf.apply(
        x, half, seeds, *weights, *biases, weight, bias, norm_weight, norm_bias, batch.bias
    )
    return remember(y, z, statistics, norm_weight, norm_bias)


def feed_forward_half(
    x: Tensor,
    weight_1: Tensor,
    bias_1: Tensor | None,
    activation: str,
    weight_2: Tensor,
    bias_2: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    recompute: bool,
) -> Tensor:
    """`fastbert.ops.feed_forward_add_norm`, whose arguments these are, for ``x`` ``[T, E]``."""
    half = _FeedForward(activation, recompute, eps, dropout_p, norm_dtype(x))
    if dropout_p > 0.0 and seed is None:
        seed = dropout_seed(x.device)
    y, z, statistics = _FeedForwardHalf.apply(
        x, half, seed, weight_1, bias_1, weight_2, bias_2, norm_weight, norm_bias
    )
    return remember(y, z, statistics, norm_weight, norm_bias)


def whole_layer(
    x: Tensor,
    batch: PackedBatch,
    tensors: tuple[Tensor | None, ...],
    *,
    head_size: int,
    scale: float,
    attention_dropout_p: float,
    activation: str,
    eps: tuple[float, float],
    dropout_p: tuple[float, float],
    seeds: tuple[Tensor | None, Tensor | None, Tensor | None],
    repeats: Repeats,
) -> Tensor:
    """`attention_half` and `feed_forward_half` as one function, for one of several layers that are
    alike.

    Args:
        x: ``[T, E]``, contiguous.
        batch: as of `attention_half`.
        tensors: weights and biases of q, k and v, those of the projection and of its norm, of both
            products of the second half and of its norm.
        eps, dropout_p: of the two norms, and in front of them.
        seeds: as of `attention_half`, and the third one.
        repeats: for all of the layers.
    """
    dtype = norm_dtype(x)
    (first_eps, last_eps), (first_p, last_p) = eps, dropout_p
    attention = _Attention(batch, head_size, scale, attention_dropout_p, first_eps, first_p, dtype)
    feed_forward = _FeedForward(activation, False, last_eps, last_p, dtype)
    tensors = *tensors[:10], batch.bias, *tensors[10:]
    y, z, statistics = _Layer.apply(x, attention, feed_forward, seeds, repeats, *tensors)
    return remember(y, z, statistics, *tensors[-2:])
