"""Linear layers, alone or with the activation that follows them.

On a GPU the matrix product is the library's, and the activation is either fused into a Triton
product or a Triton pass behind the library, whichever `fastbert.kernels._tiles.linear_route` says.
On a CPU in fp32 the product is oneDNN's, which takes the activation into its epilogue and reads
the weight as it is; torch's own fp32 route is BLAS, which is up to 1.6 times slower where MKL is
not on its home hardware.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import resolve
from .gradient import wants_gradient
from .layernorm import layer_norm
from .reference import bias_activation_ref, linear_ref
from .registry import define

__all__ = ["ACTIVATIONS", "activate", "linear", "linear_add_norm", "linear_gelu"]

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
_ONEDNN_EPILOGUE = {None: ("none", ""), "gelu": ("gelu", "none"), "relu": ("relu", "")}


def _launch_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    from ..kernels.linear import linear_activation_fwd

    return linear_activation_fwd(x, weight, bias, activation=activation)


def _launch_bias_activation(x: Tensor, bias: Tensor | None, activation: str) -> None:
    from ..kernels.linear import bias_activation_fwd_

    bias_activation_fwd_(x, bias, activation=activation)


_linear_activation = define(
    "linear_activation(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor",
    _launch_linear,
    lambda x, weight, bias, activation: x.new_empty(x.shape[0], weight.shape[0]),
)
_bias_activation_ = define(
    "bias_activation_(Tensor(a!) x, Tensor? bias, str activation) -> ()",
    _launch_bias_activation,
    lambda x, bias, activation: None,
)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """``activation(x @ weight.T + bias)``, the layout of ``torch.nn.functional.linear``.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]`` or None.
        activation: None, ``"gelu"`` (the erf form, BERT's), ``"gelu_tanh"``, ``"relu"`` or
        ``"silu"``.

    Returns:
        ``[..., out]``; in the dtype of ``x``, or autocast's.

    Raises:
        ValueError: shapes that do not fit, dtypes or devices that differ, an unknown activation.

    Supported: fp32, fp16, bf16 (fp64 in torch), any size, gradients.
    """
    _validate(x, weight, bias, activation)
    if torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
        # Autocast's rules are torch's to apply, and a compiler fuses this better than opaque ops.
        return linear_ref(x, weight, bias, activation=activation)
    if resolve(x.device) == "torch":
        return _linear_in_torch(x, weight, bias, activation)
    if activation is None or x.numel() == 0 or wants_gradient(x, weight, bias):
        return linear_ref(x, weight, bias, activation=activation)
    rows = x.reshape(-1, x.shape[-1])
    if _route(rows, weight) == "fused":
        out = _linear_activation(rows, weight, bias, activation)
    else:
        out = F.linear(rows, weight)
        _bias_activation_(out, bias, activation)
    return out.view(*x.shape[:-1], weight.shape[0])


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` with BERT's activation, the erf form of GELU (Hendrycks and Gimpel, 1606.08415)."""
    return linear(x, weight, bias, activation="gelu")


def activate(x: Tensor, activation: str) -> Tensor:
    """One of `ACTIVATIONS` alone, behind a layer that is not ours to fuse with.

    Raises:
        ValueError: an unknown activation.
    """
    _check_activation(activation)
    return bias_activation_ref(x, None, activation)


def linear_add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float,
) -> Tensor:
    """``LayerNorm(x @ weight.T + bias + residual)``, the end of both halves of a BERT layer.

    The sums ride on the product's epilogue where the library offers one (oneDNN), else on the
    norm's kernel, so that they cost no pass of their own.

    Args:
        x: ``[T, in]``.
        weight, bias: ``[out, in]`` and ``[out]`` or None.
        residual: ``[T, out]``.
        norm_weight, norm_bias, eps: as in `fastbert.ops.layer_norm`.

    Returns:
        ``[T, out]``.

    Raises:
        ValueError: shapes that do not fit.

    Supported: as `linear` and `layer_norm`.
    """
    _validate(x, weight, bias, None)
    if _on_onednn(x, weight) and not wants_gradient(x, weight, bias, residual, norm_weight):
        if residual.shape != (*x.shape[:-1], weight.shape[0]):
            raise ValueError(
                f"linear_add_norm: expected a residual {(*x.shape[:-1], weight.shape[0])}, "
                f"got {tuple(residual.shape)}"
            )
        total = torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
        return layer_norm(total, norm_weight, norm_bias, eps=eps)
    kernel = resolve(x.device) == "triton" and not torch.compiler.is_compiling()
    product = linear(x, weight, None if kernel else bias)
    return layer_norm(
        product,
        norm_weight,
        norm_bias,
        eps=eps,
        residual=residual,
        input_bias=bias if kernel else None,
    )


def _check_activation(activation: str | None) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"linear: expected activation to be None or one of {', '.join(ACTIVATIONS)}, "
            f"got {activation!r}"
        )


def _validate(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    _check_activation(activation)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            "linear: expected x [..., in] and weight [out, in], "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: expected a bias ({weight.shape[0]},), got {tuple(bias.shape)}")


def _route(rows: Tensor, weight: Tensor) -> str:
    from ..kernels._device import device_arch
    from ..kernels._tiles import linear_route

    (m, k), n = rows.shape, weight.shape[0]
    return linear_route(m=m, n=n, k=k, dtype=rows.dtype, arch=device_arch(rows.device))


@cache
def _has_onednn_linear() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    attr, algorithm = _ONEDNN_EPILOGUE[activation]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, attr, [], algorithm)


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias, None)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            grad @ weight if need_x else None,
            rows.t() @ x.flatten(0, -2) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


def _on_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's fp32 product takes these: plain tensors on a CPU, nothing being traced."""
    plain = (Tensor, torch.nn.Parameter)
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(x) in plain
        and type(weight) in plain
        and x.dim() >= 2
        and x.numel() > 0
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
        and _has_onednn_linear()
        and resolve(x.device) == "torch"
    )


def _linear_in_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    if not _on_onednn(x, weight):
        return linear_ref(x, weight, bias, activation=activation)
    if not wants_gradient(x, weight, bias) and activation in _ONEDNN_EPILOGUE:
        return _onednn(x, weight, bias, activation)
    out = _OneDnnLinear.apply(x, weight, bias)
    return out if activation is None else bias_activation_ref(out, None, activation)
