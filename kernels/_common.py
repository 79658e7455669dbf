"""What two or more kernels use: constants and activation functions."""

import triton
import triton.language as tl

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")

LOG2E = tl.constexpr(1.4426950408889634)  # log2(e): exp(x) = exp2(x * LOG2E)
LN2 = tl.constexpr(0.6931471805599453)  # log(x) = log2(x) * LN2


@triton.jit
def _normal(x, SHORT_ERF: tl.constexpr):
    """Phi(x) and phi(x), the normal distribution and its density; Phi by erf: the library's, or a
    formula good to 5e-7 where storage rounds more.

    The formula is Abramowitz and Stegun 7.1.26 for erfc, which keeps the tail for negative x and
    shares its exponential with phi. It takes a quarter fewer instructions than the library's erf,
    and erf-GELU is bound by them, not by memory.
    """
    e = tl.exp2(-0.5 * x * x * LOG2E)  # exp(-x**2 / 2)
    if SHORT_ERF:
        z = tl.abs(x) * 0.7071067811865476
        t = 1.0 / (1.0 + 0.3275911 * z)
        poly = t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))
        poly = t * (0.254829592 + t * (-0.284496736 + poly))
        erfc = poly * e
        cdf = tl.where(x >= 0.0, 1.0 - 0.5 * erfc, 0.5 * erfc)
    else:
        cdf = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
    return cdf, e * 0.3989422804014327  # 1 / sqrt(2 * pi)


@triton.jit
def _sigmoids(x):
    """sigmoid(x) and sigmoid(-x), neither as a difference from 1."""
    e = tl.exp2(-tl.abs(x) * LOG2E)  # at most 1: no overflow for either sign
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x >= 0.0, large, small), tl.where(x >= 0.0, small, large)


@triton.jit
def _gelu_tanh_gates(x):
    """``0.5 * (1 + tanh(u))``, which is ``sigmoid(2 * u)``, and 1 minus that."""
    return _sigmoids(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, SHORT_ERF: tl.constexpr):
    """One of `ACTIVATIONS` on fp32 values."""
    if ACTIVATION == "gelu":
        return x * _normal(x, SHORT_ERF)[0]
    elif ACTIVATION == "gelu_tanh":
        return x * _gelu_tanh_gates(x)[0]
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    else:
        tl.static_assert(ACTIVATION == "silu")
        return x * _sigmoids(x)[0]


@triton.jit
def activation_slope(x, ACTIVATION: tl.constexpr, SHORT_ERF: tl.constexpr):
    """The derivative of one of `ACTIVATIONS` at fp32 values."""
    if ACTIVATION == "gelu":
        cdf, density = _normal(x, SHORT_ERF)
        return cdf + x * density
    elif ACTIVATION == "gelu_tanh":
        gate, rest = _gelu_tanh_gates(x)
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return gate + x * gate * rest * inner
    elif ACTIVATION == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "silu")
        gate, rest = _sigmoids(x)
        return gate + x * gate * rest
