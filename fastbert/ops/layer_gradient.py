"""The two halves of a BERT layer for training on the kernels, each as one autograd function.

Autograd calls Python for every function, forward and backward, and adds up the gradients of a
residual in passes of their own. A half that is one function is two calls, its products add to what
has come through the residual, and what it keeps for backward is what `fastbert.ops.linear_gradient`
and `fastbert.ops.recompute` keep: no result of a norm or of an activation.
"""

from __future__ import annotations

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

__all__ = ["attention_half", "feed_forward_half", "of_one_dtype", "takes_attention_half"]


def _as(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def _for_backward(parts: tuple[Tensor, ...], joined: Tensor) -> tuple[Tensor | None, ...]:
    """What is kept of weights that were joined: themselves, to be joined again, since they are kept
    anyway; or what was made of them where that took a conversion, as autocast does."""
    return parts if parts[0].dtype == joined.dtype else (joined, None, None)


def _add_product_(residual: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` on top of what came through the residual, in its memory."""
    if residual.dtype == a.dtype:
        return residual.addmm_(a, b)
    return residual.add_(a @ b)


def _norm_backward(ctx, dy, x_dtype, z, statistics, weight, seed, needs, p):
    """The gradients of the product before the norm, of the residual (memory of its own or that of
    the first one) and those of the norm's weight and bias and the product's bias."""
    needs_x, *of_rows = needs
    d, dresidual, totals = layer_norm_bwd(
        dy, z, statistics, weight, ctx.dtype, x_dtype if needs_x else None, of_rows,
        one_dtype(*ctx.rows), p, seed,
    )  # fmt: skip
    total = iter(totals)
    sums = [
        next(total).to(dtype) if n else None for n, dtype in zip(of_rows, ctx.rows, strict=True)
    ]
    return d, d if needs_x and dresidual.numel() == 0 else dresidual, sums


class _AttentionHalf(torch.autograd.Function):
    """``norm(dropout(attention(x) @ w + b) + x)``; also gives the sum and its statistics."""

    @staticmethod
    def forward(ctx, x, batch, options, seeds, *tensors):
        weights, biases, (weight, bias, norm_weight, norm_bias) = (
            tensors[:3], tensors[3:6], tensors[6:],
        )  # fmt: skip
        head_size, scale, attention_p, eps, dropout_p, out_dtype = options
        dtype = compute_dtype(x)
        joined, weight = torch.cat(weights).to(dtype), weight.to(dtype)
        qkv = F.linear(x.to(dtype), joined, torch.cat(biases).to(dtype))
        qkv = qkv.unflatten(-1, (3, -1, head_size))
        context, lse = run_varlen(*qkv.unbind(1), batch, batch, scale, attention_p, seeds[0])
        inner = F.linear(context.flatten(1), weight)
        y, z, statistics = layer_norm_fwd(
            inner, norm_weight, norm_bias, eps, x, bias, dropout_p, seeds[1], True, out_dtype
        )
        source = kept(x) if any(ctx.needs_input_grad[4:7]) else ()
        ctx.save_for_backward(
            weight, norm_weight, qkv, context, lse, z, statistics, *seeds,
            *_for_backward(weights, joined), *source,
        )  # fmt: skip
        ctx.batch, ctx.options, ctx.dtype, ctx.x_dtype = batch, options, dtype, x.dtype
        ctx.parts = [t.shape[0] for t in weights]
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        ctx.rows = [ctx.dtypes[i] for i in (8, 9, 7)]
        ctx.mark_non_differentiable(z, statistics)
        ctx.set_materialize_grads(False)
        return y, z, statistics

    @staticmethod
    @first_order_only
    def backward(ctx, dy: Tensor | None, *unused):
        if dy is None:
            return (None,) * 14
        weight, norm_weight, qkv, context, lse, z, statistics, *rest = ctx.saved_tensors
        attention_seed, seed, wq, wk, wv, *source = rest
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        _, scale, attention_p, _, dropout_p, _ = ctx.options
        dtype, dtypes = ctx.dtype, ctx.dtypes
        d, dx, (dnorm_weight, dnorm_bias, dbias) = _norm_backward(
            ctx, dy, ctx.x_dtype, z, statistics, norm_weight, seed,
            (need_x, needs[8], needs[9], needs[7]), dropout_p,
        )  # fmt: skip
        dout = (d.t() @ context.flatten(1)).to(dtypes[6]) if needs[6] else None
        dweights = dbiases = (None,) * 3
        if need_x or any(needs[:6]):
            dcontext = (d @ weight).view(context.shape)
            (dqkv, *_) = run_varlen_bwd(
                dcontext, *qkv.unbind(1), context, lse, ctx.batch, ctx.batch, scale, attention_p,
                attention_seed, True,
            )  # fmt: skip
            dqkv = dqkv.flatten(1)
            if any(needs[:3]):
                dweight = dqkv.t() @ remade(tuple(source), dtype)
                dweights = split_gradient(dweight, ctx.parts, dtypes[:3], needs[:3])
            if any(needs[3:6]):
                dbiases = split_gradient(dqkv.sum(0), ctx.parts, dtypes[3:6], needs[3:6])
            if need_x:
                dx = _add_product_(dx, dqkv, wq if wk is None else torch.cat((wq, wk, wv)))
        return (
            dx if need_x else None, *(None,) * 3, *dweights, *dbiases, dout, dbias, dnorm_weight,
            dnorm_bias,
        )  # fmt: skip


class _FeedForwardHalf(torch.autograd.Function):
    """``norm(dropout(act(x @ w1 + b1) @ w2 + b2) + x)``; also gives the sum and its statistics."""

    @staticmethod
    def forward(ctx, x, options, seed, *tensors):
        weight_1, bias_1, weight_2, bias_2, norm_weight, norm_bias = tensors
        activation, recompute, eps, dropout_p, out_dtype = options
        dtype = compute_dtype(x)
        weight_1, weight_2 = weight_1.to(dtype), weight_2.to(dtype)
        pre = F.linear(x.to(dtype), weight_1, _as(bias_1, dtype))
        inner = F.linear(activation_fwd(pre, activation), weight_2)
        y, z, statistics = layer_norm_fwd(
            inner, norm_weight, norm_bias, eps, x, bias_2, dropout_p, seed, True, out_dtype
        )
        source = kept(x) if ctx.needs_input_grad[3] or recompute else ()
        ctx.save_for_backward(
            weight_1, bias_1, weight_2, norm_weight, None if recompute else pre, z, statistics,
            seed, *source,
        )  # fmt: skip
        ctx.options, ctx.dtype, ctx.x_dtype = options, dtype, x.dtype
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        ctx.rows = [ctx.dtypes[i] for i in (4, 5, 3)]
        ctx.mark_non_differentiable(z, statistics)
        ctx.set_materialize_grads(False)
        return y, z, statistics

    @staticmethod
    @first_order_only
    def backward(ctx, dy: Tensor | None, *unused):
        if dy is None:
            return (None,) * 9
        weight_1, bias_1, weight_2, norm_weight, pre, z, statistics, seed, *source = (
            ctx.saved_tensors
        )
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        activation, _, _, dropout_p, _ = ctx.options
        dtype, dtypes = ctx.dtype, ctx.dtypes
        d, dx, (dnorm_weight, dnorm_bias, dbias_2) = _norm_backward(
            ctx, dy, ctx.x_dtype, z, statistics, norm_weight, seed,
            (need_x, needs[4], needs[5], needs[3]), dropout_p,
        )  # fmt: skip
        x = remade(tuple(source), dtype) if source else None
        if pre is None:
            pre = F.linear(x, weight_1, _as(bias_1, dtype))
        dpre, h, dbias_1 = activation_bwd(
            d @ weight_2, pre, activation, dtypes[1] if needs[1] else None, needs[2]
        )
        # d may be the gradient of the residual too: it is read before that is added to.
        dweight_2 = (d.t() @ h).to(dtypes[2]) if needs[2] else None
        return (
            _add_product_(dx, dpre, weight_1) if need_x else None,
            None,
            None,
            (dpre.t() @ x).to(dtypes[0]) if needs[0] else None,
            dbias_1.to(dtypes[1]) if needs[1] else None,
            dweight_2,
            dbias_2,
            dnorm_weight,
            dnorm_bias,
        )


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
        seeds: from `fastbert.ops.dropout.dropout_seeds`, for dropout in attention and behind it;
            None where nothing is dropped.
    """
    options = head_size, scale, attention_dropout_p, eps, dropout_p, norm_dtype(x)
    y, z, statistics = _AttentionHalf.apply(
        x, batch, options, seeds, *weights, *biases, weight, bias, norm_weight, norm_bias
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
    options = activation, recompute, eps, dropout_p, norm_dtype(x)
    if dropout_p > 0.0 and seed is None:
        seed = dropout_seed(x.device)
    y, z, statistics = _FeedForwardHalf.apply(
        x, options, seed, weight_1, bias_1, weight_2, bias_2, norm_weight, norm_bias
    )
    return remember(y, z, statistics, norm_weight, norm_bias)
