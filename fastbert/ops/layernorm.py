"""LayerNorm over the sum of a layer's output, its bias and the residual, in one pass.

Between two products of a BERT layer everything is here: the bias of the first, dropout, the
residual and the norm. Backward gives all their gradients in one pass too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import resolve
from .dropout import check_dropout, dropout_seed
from .gradient import first_order_only, one_dtype, refuse_seed, wants_gradient
from .recompute import remember
from .reference import layer_norm_ref
from .registry import define

__all__ = ["layer_norm", "layer_norm_bwd", "layer_norm_fwd", "norm_dtype"]


def _launch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    input_bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    keep_sum: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.layernorm import layernorm_fwd

    y, z, statistics = layernorm_fwd(
        x, residual, input_bias, weight, bias, eps=eps, dropout_p=dropout_p, seed=seed,
        keep_sum=keep_sum, keep_statistics=keep_sum, out_dtype=dtype,
    )  # fmt: skip
    if not keep_sum:
        return y, x.new_empty(0), x.new_empty(0, dtype=torch.float32)
    return y, z, statistics


def _shapes(x, weight, bias, eps, residual, input_bias, dropout_p, seed, keep_sum, dtype):
    wide = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape, dtype=wide) if keep_sum else x.new_empty(0),
        x.new_empty((2, x.shape[0]) if keep_sum else 0, dtype=torch.float32),
    )


def _launch_bwd(
    dy: Tensor,
    z: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    dx_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    sums: tuple[bool, ...],
    sums_dtype: torch.dtype,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.layernorm import layernorm_bwd

    dx, dresidual, totals = layernorm_bwd(
        dy, z, statistics, weight, dx_dtype=dx_dtype, residual_dtype=residual_dtype, sums=sums,
        sums_dtype=sums_dtype, dropout_p=dropout_p, seed=seed,
    )  # fmt: skip
    return dx, dy.new_empty(0) if dresidual is None else dresidual, totals


def _bwd_shapes(
    dy, z, statistics, weight, dx_dtype, residual_dtype, sums, sums_dtype, dropout_p, seed
):  # fmt: skip
    own = residual_dtype is not None and (dropout_p > 0.0 or residual_dtype != dx_dtype)
    return (
        dy.new_empty(dy.shape, dtype=dx_dtype),
        dy.new_empty(dy.shape, dtype=residual_dtype) if own else dy.new_empty(0),
        dy.new_empty(sum(sums), dy.shape[1], dtype=sums_dtype),
    )


layer_norm_fwd = define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? residual, "
    "Tensor? input_bias, float dropout_p, Tensor? seed, bool keep_sum, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor)",
    _launch,
    _shapes,
)
# dx, the gradient of the residual (empty where it is dx itself or not wanted), and those of weight,
# bias and input_bias that are wanted, one below the other.
layer_norm_bwd = define(
    "layer_norm_bwd(Tensor dy, Tensor z, Tensor statistics, Tensor? weight, ScalarType dx_dtype, "
    "ScalarType? residual_dtype, bool[] sums, ScalarType sums_dtype, float dropout_p, "
    "Tensor? seed) "
    "-> (Tensor, Tensor, Tensor)",
    _launch_bwd,
    _bwd_shapes,
)


class _LayerNorm(torch.autograd.Function):
    """Also gives the sum and its statistics, which have no gradient: they are for `remember`."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, input_bias, eps, dropout_p, seed, dtype):
        y, z, statistics = layer_norm_fwd(
            x, weight, bias, eps, residual, input_bias, dropout_p, seed, True, dtype
        )
        ctx.save_for_backward(z, statistics, weight, seed)
        ctx.dropout_p = dropout_p
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias, residual)]
        ctx.input_bias_dtype = None if input_bias is None else input_bias.dtype
        ctx.mark_non_differentiable(z, statistics)
        ctx.set_materialize_grads(False)  # z and statistics would get zeros of their sizes
        return y, z, statistics

    @staticmethod
    @first_order_only
    def backward(ctx, dy: Tensor | None, *unused):
        if dy is None:
            return (None,) * 9
        z, statistics, weight, seed = ctx.saved_tensors
        need_x, need_weight, need_bias, need_residual, need_input_bias = ctx.needs_input_grad[:5]
        x_dtype, weight_dtype, bias_dtype, residual_dtype = ctx.dtypes
        dx, dresidual, totals = layer_norm_bwd(
            dy, z, statistics, weight, x_dtype, residual_dtype if need_residual else None,
            (need_weight, need_bias, need_input_bias),
            one_dtype(weight_dtype, bias_dtype, ctx.input_bias_dtype), ctx.dropout_p, seed,
        )  # fmt: skip
        total = iter(totals)
        if need_residual and dresidual.numel() == 0:
            dresidual = dx
        return (
            dx if need_x else None,
            next(total).to(weight_dtype) if need_weight else None,
            next(total).to(bias_dtype) if need_bias else None,
            dresidual if need_residual else None,
            next(total).to(ctx.input_bias_dtype) if need_input_bias else None,
            *(None,) * 4,
        )


def norm_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a norm's result: that of ``x``, or fp32 under autocast, as torch has it."""
    return torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    residual: Tensor | None = None,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``LayerNorm(dropout(x + input_bias) + residual) * weight + bias`` over the last dimension
    (1607.06450).

    Args:
        x: ``[..., N]``.
        weight, bias: ``[N]`` or None.
        eps: added to the variance.
        residual: like ``x``, or None.
        input_bias: ``[N]``, the bias of the linear layer that made ``x``, or None.
        dropout_p: probability of dropping a value of ``x + input_bias``.
        seed: from `fastbert.ops.dropout_seed`, for a mask that can be had again; drawn if None.
            Kernels only.

    Returns:
        Like ``x``, contiguous; fp32 under autocast. Sum and statistics are in fp32 whatever the
        dtype (fp64 for fp64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a probability outside 0 to 1.
        NotImplementedError: a seed where torch runs.

    Supported: fp32, fp16, bf16 (fp64 in torch), widths up to 8192 (any in torch), gradients (first
    order with the kernels). Under autocast the tensors may differ in dtype.
    """
    for name, t in (("weight", weight), ("bias", bias), ("input_bias", input_bias)):
        if t is not None and t.shape != x.shape[-1:]:
            raise ValueError(
                f"layer_norm: expected {name} ({x.shape[-1]},) for {x.shape=}, got {tuple(t.shape)}"
            )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"layer_norm: expected a residual {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    check_dropout("layer_norm", dropout_p, seed, x.device)
    if resolve(x.device, x.dtype) == "torch" or x.numel() == 0:
        refuse_seed("layer_norm", seed)
        return _in_torch(x, weight, bias, eps, residual, input_bias, dropout_p)
    mixed = torch.is_autocast_enabled(x.device.type)
    for name, t in (("residual", residual), ("input_bias", input_bias), ("weight", weight)):
        if t is not None and (t.device != x.device or (t.dtype != x.dtype and not mixed)):
            raise ValueError(
                f"layer_norm: expected {name} as x, {x.dtype} on {x.device}, "
                f"got {t.dtype} on {t.device}"
            )
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    residual = None if residual is None else residual.reshape(-1, width)
    if dropout_p > 0.0 and seed is None:
        seed = dropout_seed(x.device)
    dtype = norm_dtype(x)
    if not wants_gradient(x, weight, bias, residual, input_bias):
        y, *_ = layer_norm_fwd(
            rows, weight, bias, eps, residual, input_bias, dropout_p, seed, False, dtype
        )
        return y.view(x.shape)
    y, z, statistics = _LayerNorm.apply(
        rows, weight, bias, residual, input_bias, eps, dropout_p, seed, dtype
    )
    y = y.view(x.shape)
    if torch.compiler.is_compiling():
        return y
    return remember(y, z, statistics, weight, bias)


def _in_torch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    input_bias: Tensor | None,
    dropout_p: float,
) -> Tensor:
    if dropout_p > 0.0:
        x = F.dropout(x if input_bias is None else x + input_bias, dropout_p)
        input_bias = None
    return layer_norm_ref(x, weight, bias, eps, residual=residual, input_bias=input_bias)
