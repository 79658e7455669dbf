"""Linear layers for training on the kernels: products are the library's, what is kept is not.

Autograd would keep the input of every product and of every activation. Here a product whose input
is a norm keeps what the norm keeps anyway (`fastbert.ops.recompute`), and a product with an
activation behind it keeps what enters the activation. No product is computed twice unless
``recompute`` asks for it. Whole halves of a layer are in `fastbert.ops.layer_gradient`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .gradient import first_order_only, one_dtype
from .recompute import kept, remade
from .registry import define

__all__ = [
    "activation_bwd", "activation_fwd", "compute_dtype", "linear_function", "split_gradient",
]  # fmt: skip


def _launch(x: Tensor, activation: str) -> Tensor:
    from ..kernels.linear import activation_fwd

    return activation_fwd(x, activation=activation)


def _launch_bwd(
    dy: Tensor, x: Tensor, activation: str, bias_dtype: torch.dtype | None, again: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.linear import activation_bwd

    dx, y, dbias = activation_bwd(dy, x, activation=activation, bias_dtype=bias_dtype, again=again)
    return dx, x.new_empty(0) if y is None else y, x.new_empty(0) if dbias is None else dbias


activation_fwd = define(
    "activation(Tensor x, str activation) -> Tensor",
    _launch,
    lambda x, activation: x.new_empty(x.shape),
)
activation_bwd = define(
    "activation_bwd(Tensor dy, Tensor x, str activation, ScalarType? bias_dtype, bool again) "
    "-> (Tensor, Tensor, Tensor)",
    _launch_bwd,
    lambda dy, x, activation, bias_dtype, again: (
        x.new_empty(x.shape),
        x.new_empty(x.shape if again else 0),
        x.new_empty(0) if bias_dtype is None else x.new_empty(x.shape[1], dtype=bias_dtype),
    ),
)


def compute_dtype(x: Tensor) -> torch.dtype:
    """That of the products: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _joined(tensors: tuple[Tensor | None, ...], dtype: torch.dtype) -> Tensor | None:
    """Several weights or biases as one, stacked along dimension 0."""
    if tensors[0] is None:
        return None
    return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).to(dtype)


def split_gradient(
    gradient: Tensor, sizes: list[int], dtypes: Sequence[torch.dtype], needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradient of parameters that were joined, as one for each that wants it, in its dtype."""
    parts = gradient.to(one_dtype(*dtypes)).split(sizes)
    return [
        (g if g.dtype is t else g.to(t)) if n else None
        for g, t, n in zip(parts, dtypes, needed, strict=True)
    ]


class _Linear(torch.autograd.Function):
    """``act(x @ cat(weights).T + cat(biases))``; the parts are kept, not their concatenation."""

    @staticmethod
    def forward(ctx, x, dtype, activation, recompute, count, *parts):
        weights, biases = parts[:count], parts[count:]
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        pre = F.linear(rows, _joined(weights, dtype), _joined(biases, dtype))
        source = kept(x) if any(ctx.needs_input_grad[5 : 5 + count]) or recompute else ()
        inner = () if activation is None or recompute else (pre,)
        ctx.save_for_backward(*parts, *inner, *source)
        ctx.activation, ctx.count, ctx.inner = activation, count, len(inner)
        ctx.dtype, ctx.x_dtype, ctx.x_shape = dtype, x.dtype, x.shape
        y = pre if activation is None else activation_fwd(pre, activation)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @first_order_only
    def backward(ctx, dy: Tensor):
        count, dtype, needed = ctx.count, ctx.dtype, ctx.needs_input_grad
        saved = ctx.saved_tensors
        weights, biases = saved[:count], saved[count : 2 * count]
        inner, source = saved[2 * count : 2 * count + ctx.inner], saved[2 * count + ctx.inner :]
        need_weight, need_bias = any(needed[5 : 5 + count]), any(needed[5 + count :])
        weight = _joined(weights, dtype)
        x = remade(source, dtype) if source else None
        dy = dy.reshape(-1, dy.shape[-1])
        dbias = None
        if ctx.activation is not None:
            pre = inner[0] if inner else F.linear(x, weight, _joined(biases, dtype))
            bias_dtype = one_dtype(*(t.dtype for t in biases)) if need_bias else None
            dy, _, dbias = activation_bwd(dy, pre, ctx.activation, bias_dtype, False)
        elif need_bias:
            dbias = dy.sum(0)
        dx = (dy @ weight).view(ctx.x_shape).to(ctx.x_dtype) if needed[0] else None
        dweights = dbiases = (None,) * count
        sizes = [t.shape[0] for t in weights]
        if need_weight:
            dweights = split_gradient(
                dy.t() @ x, sizes, [t.dtype for t in weights], needed[5 : 5 + count]
            )
        if need_bias:
            dbiases = split_gradient(dbias, sizes, [t.dtype for t in biases], needed[5 + count :])
        return dx, *(None,) * 4, *dweights, *dbiases


def linear_function(
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    activation: str | None = None,
    recompute: bool = False,
) -> Tensor:
    """``act(x @ cat(weights).T + cat(biases))``; biases are all there or all None."""
    dtype = compute_dtype(x)
    return _Linear.apply(x, dtype, activation, recompute, len(weights), *weights, *biases)
