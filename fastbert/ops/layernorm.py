"""LayerNorm over the sum of a layer's output, its bias and the residual, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import resolve
from .gradient import run_kernel
from .reference import layer_norm_ref
from .registry import define

__all__ = ["layer_norm"]


def _launch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    input_bias: Tensor | None,
) -> Tensor:
    from ..kernels.layernorm import layernorm_fwd

    return layernorm_fwd(x, residual, input_bias, weight, bias, eps=eps)[0]


_layer_norm = define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? residual, "
    "Tensor? input_bias) -> Tensor",
    _launch,
    lambda x, weight, bias, eps, residual, input_bias: x.new_empty(x.shape),
)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    residual: Tensor | None = None,
    input_bias: Tensor | None = None,
) -> Tensor:
    """``LayerNorm(x + residual + input_bias) * weight + bias`` over the last dimension
    (1607.06450).

    Args:
        x: ``[..., N]``.
        weight, bias: ``[N]`` or None.
        eps: added to the variance.
        residual: like ``x``, or None.
        input_bias: ``[N]``, the bias of the linear layer that made ``x``, or None.

    Returns:
        Like ``x``, contiguous. Sum and statistics are in fp32 whatever the dtype (fp64 for fp64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Supported: fp32, fp16, bf16 (fp64 in torch), widths up to 8192 (any in torch), gradients.
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
    if resolve(x.device) == "torch" or x.numel() == 0 or torch.is_autocast_enabled(x.device.type):
        return _in_torch(x, weight, bias, eps, residual, input_bias)
    for name, t in (("residual", residual), ("input_bias", input_bias), ("weight", weight)):
        if t is not None and (t.device != x.device or t.dtype != x.dtype):
            raise ValueError(
                f"layer_norm: expected {name} as x, {x.dtype} on {x.device}, "
                f"got {t.dtype} on {t.device}"
            )
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    residual = None if residual is None else residual.reshape(-1, width)
    args = (rows, weight, bias, eps, residual, input_bias)
    return run_kernel(_layer_norm, _in_torch, *args).view(x.shape)


def _in_torch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    input_bias: Tensor | None,
) -> Tensor:
    return layer_norm_ref(x, weight, bias, eps, residual=residual, input_bias=input_bias)
