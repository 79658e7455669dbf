"""oneDNN's products in int8, behind private operators of torch that only this module knows.

They are what Inductor emits for models that torchao has quantised: integers in, sums in int32, fp32
out. Weights have a scale for each output, as they have in torch and ONNX Runtime. Rows have a scale
and an offset each (token-wise quantisation: Yao et al., ZeroQuant, 2206.01861), where those have
one for all rows: a row's result depends on nothing but the row, whatever else is in a batch, and an
outlier costs its own row digits and no other.

A row is ``x = step * n + low`` with integers n from 0 to `_levels`, so that ``x @ w.T`` is
``step * (n @ w.T) + low * w.sum(1)``.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import onednn
from .linear import activate

__all__ = ["DTYPES", "Packed", "available", "blocks", "nbytes", "packed", "product", "product_add"]

DTYPES = (torch.float32,)  # of rows
_LEAST = 1e-30  # the largest magnitude of an output's weights, or span of a row, if all are alike
_ROWS = 128  # what the layout is made for; it takes any number


class Packed(NamedTuple):
    """A weight ``[out, in]`` in int8.

    Attributes:
        weight: in oneDNN's layout.
        scales: ``[out]``, fp32.
        sums: ``[out]``, fp32, of each output's weights as they are now.
        zeros: ``[out]``, int64: which integer is zero, as oneDNN asks.
    """

    weight: Tensor
    scales: Tensor
    sums: Tensor
    zeros: Tensor


@cache
def available() -> bool:
    """Whether this torch has the operators, and they give the right numbers."""
    try:
        return torch.backends.mkldnn.is_available() and _is_exact(127)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False


@cache
def _levels() -> int:
    """The largest integer of a row: 255, or 127 on a CPU that adds two products in 16 bits first
    (without VNNI), where more would overflow."""
    return 255 if _is_exact(255) else 127


def packed(weight: Tensor) -> Packed:
    """A copy of ``weight [out, in]``, fp32, in int8: the largest magnitude of an output is 127."""
    weight = weight.detach()
    scales = weight.abs().amax(1).clamp_min_(_LEAST) / 127
    integers = (weight / scales[:, None]).round_().to(torch.int8)
    return _with_sums(integers, scales)


def nbytes(weight: Packed) -> int:
    """Memory of what `packed` has made."""
    return weight.weight.numel() + 16 * weight.scales.numel()


def blocks(weight: Packed) -> list[tuple[int, int]]:
    """Where the integers lie in memory, as `fastbert.ops.onednn.blocks`."""
    return onednn.blocks(weight.weight)


def product(x: Tensor, weight: Packed, bias: Tensor | None, activation: str | None) -> Tensor:
    """``activation(x @ weight.T + bias)``.

    Args:
        x: ``[T, in]``, fp32.
        weight: ``[out, in]``, from `packed`.
        bias: ``[out]``, fp32, or None.
        activation: one of `fastbert.ops.linear.ACTIVATIONS`, or None.

    Returns:
        ``[T, out]``.
    """
    out = _product(x, weight, bias)
    return out if activation is None else activate(out, activation)


def product_add(x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor) -> Tensor:
    """``x @ weight.T + bias + residual`` with a residual ``[T, out]``."""
    return _product(x, weight, bias).add_(residual)


def _product(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    integers, step, low = _integers_of(x, _levels())
    out = _multiply(integers, weight)
    out.mul_(step)
    if bias is not None:
        out.add_(bias)
    return out.addcmul_(low, weight.sums)


def _integers_of(x: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """``[T, in]`` as uint8 from 0 to ``levels``, and step and low of each row ``[T, 1]``."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)  # aminmax takes 15 times as long
    step = (high - low).clamp_min_(_LEAST).div_(levels)
    scaled = (x - low).div_(step).round_()
    if levels <= 127:  # torch converts to int8 in a fifth of the time
        return scaled.to(torch.int8).view(torch.uint8), step, low
    return scaled.to(torch.uint8), step, low


def _with_sums(integers: Tensor, scales: Tensor) -> Packed:
    """``[out, in]`` int8 and ``[out]``."""
    weight = torch.ops.onednn.qlinear_prepack.default(integers, [_ROWS, integers.shape[1]])
    sums = integers.sum(1).to(torch.float32) * scales
    return Packed(weight, scales, sums, torch.zeros(scales.shape, dtype=torch.int64, device="cpu"))


def _multiply(integers: Tensor, weight: Packed) -> Tensor:
    """``integers @ weight.T``, ``[T, in]`` uint8 -> ``[T, out]`` fp32."""
    return torch.ops.onednn.qlinear_pointwise.default(
        integers, 1.0, 0, weight.weight, weight.scales, weight.zeros, None, 1.0, 0, torch.float32,
        "none", [], "",
    )  # fmt: skip


def _is_exact(levels: int) -> bool:
    """Whether sums of integers are, the largest ones included."""
    generator = torch.Generator("cpu").manual_seed(0)
    options = {"generator": generator, "device": "cpu"}
    x = torch.randint(0, levels + 1, (5, 96), dtype=torch.uint8, **options)
    weight = torch.randint(-127, 128, (48, 96), dtype=torch.int8, **options)
    x[0], weight[0] = levels, 127
    ones = torch.ones(48, dtype=torch.float32, device="cpu")  # whatever somebody has as a default
    with torch.inference_mode():
        found = _multiply(x, _with_sums(weight, ones))
        return torch.equal(found, (x.long() @ weight.long().T).to(torch.float32))
