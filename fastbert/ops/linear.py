"""Linear layers, alone or with the activation that follows them.

On a GPU the matrix product is the library's, and the activation is either fused into a Triton
product or a Triton pass behind the library, whichever `fastbert.kernels._tiles.linear_route` says.
On a CPU in fp32 the product is oneDNN's, which takes the activation into its epilogue and reads
the weight as it is; torch's own fp32 route is BLAS, which is up to 1.6 times slower where MKL is
not on its home hardware.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import onednn
from .backend import resolve, watched
from .dropout import check_dropout
from .gradient import refuse_seed, trains_on_kernels, wants_gradient
from .layer_gradient import feed_forward_half, of_one_dtype
from .layernorm import layer_norm
from .linear_gradient import linear_function
from .reference import bias_activation_ref, linear_ref
from .registry import define

__all__ = [
    "ACTIVATIONS",
    "activate",
    "check_decoder",
    "feed_forward_add_norm",
    "linear",
    "linear_add_norm",
    "linear_gelu",
    "linear_stacked",
    "plain_on_cpu",
    "route",
    "rows_on_onednn",
    "weight_gradient",
]

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
_PLAIN = (Tensor, torch.nn.Parameter)


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
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    recompute: bool = False,
) -> Tensor:
    """``activation(x @ weight.T + bias)``, the layout of ``torch.nn.functional.linear``.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]`` or None.
        activation: None, ``"gelu"`` (the erf form, BERT's), ``"gelu_tanh"``, ``"relu"`` or
            ``"silu"``.
        recompute: in backward compute the product once more instead of keeping what enters the
            activation. Kernels only; elsewhere it changes nothing.

    Returns:
        ``[..., out]``; in the dtype of ``x``, or autocast's.

    Raises:
        ValueError: shapes that do not fit, dtypes or devices that differ, an unknown activation.

    Supported: fp32, fp16, bf16 (fp64 in torch), any size, gradients (first order with the kernels).
    """
    _validate(x, weight, bias, activation)
    if trains_on_kernels(x, weight, bias):
        return linear_function(x, (weight,), (bias,), activation, recompute)
    if torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
        # Autocast's rules are torch's to apply, and a compiler fuses this better than opaque ops.
        return linear_ref(x, weight, bias, activation=activation)
    if resolve(x.device, x.dtype) == "torch":
        return _linear_in_torch(x, weight, bias, activation)
    if activation is None or x.numel() == 0:
        return linear_ref(x, weight, bias, activation=activation)
    rows = x.reshape(-1, x.shape[-1])
    if route(rows, weight) == "fused":
        out = _linear_activation(rows, weight, bias, activation)
    else:
        out = F.linear(rows, weight)
        _bias_activation_(out, bias, activation)
    return out.view(*x.shape[:-1], weight.shape[0])


def check_decoder(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Shapes of an op whose product is with a vocabulary.

    Raises:
        ValueError: they do not fit.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{op}: expected x [N, E] and weight [V, E], "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: expected a bias ({weight.shape[0]},), got {tuple(bias.shape)}")


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` with BERT's activation, the erf form of GELU (Hendrycks and Gimpel, 1606.08415)."""
    return linear(x, weight, bias, activation="gelu")


def linear_stacked(x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor, ...]) -> Tensor:
    """Several linear layers over the same rows, their results side by side: one product.

    Args:
        x: ``[..., in]``.
        weights: ``[out_i, in]`` each.
        biases: ``[out_i]`` each.

    Returns:
        ``[..., sum(out_i)]``.

    Raises:
        ValueError: shapes that do not fit.

    Supported: as `linear`. For backward the parts are kept, not their concatenation.
    """
    for weight, bias in zip(weights, biases, strict=True):
        _validate(x, weight, bias, None)
    if trains_on_kernels(x, *weights, *biases):
        return linear_function(x, weights, biases)
    return linear(x, torch.cat(weights), torch.cat(biases))


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
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``LayerNorm(dropout(x @ weight.T + bias) + residual)``, the end of both halves of a BERT
    layer.

    The sums ride on the product's epilogue where the library offers one (oneDNN), else on the
    norm's kernel, so that they cost no pass of their own.

    Args:
        x: ``[T, in]``.
        weight, bias: ``[out, in]`` and ``[out]`` or None.
        residual: ``[T, out]``.
        norm_weight, norm_bias, eps: as in `fastbert.ops.layer_norm`.
        dropout_p: probability of dropping a value of the product.
        seed: from `fastbert.ops.dropout_seed`, for a mask that can be had again; drawn if None.
            Kernels only.

    Returns:
        ``[T, out]``.

    Raises:
        ValueError: shapes that do not fit.
        NotImplementedError: a seed where torch runs.

    Supported: as `linear` and `layer_norm`.
    """
    _validate(x, weight, bias, None)
    if (
        dropout_p == 0.0
        and _on_onednn(x, weight)
        and not wants_gradient(x, weight, bias, residual, norm_weight)
    ):
        if residual.shape != (*x.shape[:-1], weight.shape[0]):
            raise ValueError(
                f"linear_add_norm: expected a residual {(*x.shape[:-1], weight.shape[0])}, "
                f"got {tuple(residual.shape)}"
            )
        refuse_seed("linear_add_norm", seed)
        total = onednn.product_add(x, weight, bias, residual)
        return layer_norm(total, norm_weight, norm_bias, eps=eps)
    kernel = _adds_in_norm(x)
    return layer_norm(
        linear(x, weight, None if kernel else bias),
        norm_weight,
        norm_bias,
        eps=eps,
        residual=residual,
        input_bias=bias if kernel else None,
        dropout_p=dropout_p,
        seed=seed,
    )


def feed_forward_add_norm(
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
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """``LayerNorm(dropout(act(x @ weight_1.T + bias_1) @ weight_2.T + bias_2) + x)``, the second
    half of a BERT layer.

    In training on the kernels neither ``x``, where it is a norm, nor the activation's result is
    kept for backward.

    Args:
        x: ``[T, E]``.
        weight_1, bias_1: ``[F, E]`` and ``[F]`` or None.
        activation: one of `ACTIVATIONS`.
        weight_2, bias_2: ``[E, F]`` and ``[E]`` or None.
        norm_weight, norm_bias, eps: as in `fastbert.ops.layer_norm`.
        dropout_p: probability of dropping a value of the second product.
        seed: from `fastbert.ops.dropout_seed`, for a mask that can be had again; drawn if None.
            Kernels only.
        recompute: as in `linear`.

    Returns:
        ``[T, E]``.

    Raises:
        ValueError: shapes that do not fit, an unknown activation.
        NotImplementedError: a seed where torch runs.

    Supported: as `linear` and `layer_norm`.
    """
    tensors = (weight_1, bias_1, weight_2, bias_2, norm_weight, norm_bias)
    if not (trains_on_kernels(x, *tensors) and of_one_dtype(x, *tensors)):
        inner = linear(x, weight_1, bias_1, activation=activation)
        return linear_add_norm(
            inner, weight_2, bias_2, x, norm_weight, norm_bias, eps=eps, dropout_p=dropout_p,
            seed=seed,
        )  # fmt: skip
    _validate(x, weight_1, bias_1, activation)
    if weight_2.shape != weight_1.shape[::-1]:
        raise ValueError(
            f"feed_forward_add_norm: expected weight_2 {tuple(weight_1.shape[::-1])}, "
            f"got {tuple(weight_2.shape)}"
        )
    for name, t in (("bias_2", bias_2), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if t is not None and t.shape != x.shape[-1:]:
            raise ValueError(
                f"feed_forward_add_norm: expected {name} ({x.shape[-1]},), got {tuple(t.shape)}"
            )
    check_dropout("feed_forward_add_norm", dropout_p, seed, x.device)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])  # itself: it may know its norm
    y = feed_forward_half(
        rows, weight_1, bias_1, activation, weight_2, bias_2, norm_weight,
        norm_bias, eps=eps, dropout_p=dropout_p, seed=seed, recompute=recompute,
    )  # fmt: skip
    return y if x.dim() == 2 else y.view(x.shape)


def _adds_in_norm(x: Tensor) -> bool:
    """Whether a bias is better added by the norm's kernel than by the product."""
    return resolve(x.device, x.dtype) == "triton" and not torch.compiler.is_compiling()


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


def route(rows: Tensor, weight: Tensor) -> str:
    """Whether the kernel with the activation in it is the faster one here, or ``"library"``."""
    from ..kernels._device import device_arch
    from ..kernels._tiles import linear_route

    (m, k), n = rows.shape, weight.shape[0]
    return linear_route(m=m, n=n, k=k, dtype=rows.dtype, arch=device_arch(rows.device))


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn.product(x, weight, bias, None)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        # reshape, not flatten: torch.autograd.functional's vectorize=True has no rule for that.
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight if need_x else None,
            weight_gradient(rows, x.reshape(-1, x.shape[-1])) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """``grad.T @ x``, ``[T, out]`` and ``[T, in]``: the gradient of the weight in ``x @ weight.T``.

    That of the rows stays with torch's product, which rounds less: it goes on through the layers.
    """
    again = torch.is_grad_enabled()  # a second derivative is wanted, which oneDNN's has not
    large = grad.numel() * x.shape[1] >= onednn.WEIGHT_GRADIENT_FROM
    if large and not again and plain_on_cpu(grad) and rows_on_onednn(x):
        return onednn.multiply(grad.t(), x)
    return grad.t() @ x


def _on_onednn(x: Tensor, weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and plain_on_cpu(weight) and rows_on_onednn(x)


def rows_on_onednn(x: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether oneDNN's product takes these rows: nobody traces or watches, autocast is off."""
    return (
        not torch.compiler.is_compiling()
        and x.dtype in dtypes
        and plain_on_cpu(x)
        and x.dim() >= 2
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and resolve(x.device) == "torch"
        and not watched()
        and onednn.available(x.dtype)
    )


def plain_on_cpu(t: Tensor) -> bool:
    """Whether a tensor is nobody's subclass, on a CPU."""
    return t.device.type == "cpu" and type(t) in _PLAIN


def _linear_in_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    if not _on_onednn(x, weight):
        return linear_ref(x, weight, bias, activation=activation)
    if not wants_gradient(x, weight, bias) and activation in onednn.EPILOGUES:
        return onednn.product(x, weight, bias, activation)
    out = _OneDnnLinear.apply(x, weight, bias)
    return out if activation is None else bias_activation_ref(out, None, activation)
