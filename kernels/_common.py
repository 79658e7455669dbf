"""What two or more kernels use: constants and activation functions."""

import triton
import triton.language as tl

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")

LOG2E = tl.constexpr(1.4426950408889634)  # log2(e): exp(x) = exp2(x * LOG2E)


@triton.jit
def _gelu(x, SHORT_ERF: tl.constexpr):
    """``x * Phi(x)``, Phi by erf: the library's, or a formula good to 5e-7 where storage rounds
    more.

    The formula is Abramowitz and Stegun 7.1.26 for erfc, which keeps the tail for negative x. It
    takes a quarter fewer instructions than the library's erf, and erf-GELU is bound by them, not
    by memory.
    """
    if not SHORT_ERF:
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    poly = t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))
    poly = t * (0.254829592 + t * (-0.284496736 + poly))
    erfc = poly * tl.exp2(-z * z * LOG2E)
    return x * tl.where(x >= 0.0, 1.0 - 0.5 * erfc, 0.5 * erfc)


@triton.jit
def _sigmoid(x):
    e = tl.exp2(-tl.abs(x) * LOG2E)  # at most 1: no overflow for either sign
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, SHORT_ERF: tl.constexpr):
    """One of `ACTIVATIONS` on fp32 values."""
    if ACTIVATION == "gelu":
        return _gelu(x, SHORT_ERF)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) = sigmoid(2 * u)
        return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    else:
        tl.static_assert(ACTIVATION == "silu")
        return x * _sigmoid(x)
