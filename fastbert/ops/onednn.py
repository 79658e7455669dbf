"""oneDNN's products on a CPU, behind private operators of torch that only this module knows, and in
a graph `onednn_layer`.

They are what Inductor emits: a product whose epilogue takes the bias, an activation or a residual,
and a layout of the weight that spares reordering it in every call. Measured on two AMD EPYC cores:
in fp32, with the weight as it is, 1.1 to 1.7 times the speed of torch's own route, which is BLAS.
In bf16 torch's own route is oneDNN too, and the layout is the gain.

What a version of torch does not have, or computes otherwise than it should, is found out by trying,
once; `available` is False then, and callers take ``torch.nn.functional.linear``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "DTYPES", "EPILOGUES", "GELU_APART_FROM", "WEIGHT_GRADIENT_FROM", "available", "blocks",
    "bucket_of", "multiply", "nbytes", "packed", "product", "product_add",
]  # fmt: skip

DTYPES = (torch.float32, torch.bfloat16)

# Activation -> what the operator calls it: ``attr`` and ``algorithm``.
EPILOGUES = {None: ("none", ""), "gelu": ("gelu", "none"), "relu": ("relu", "")}

# On AVX2 the epilogue's GELU takes longer than torch's in a pass of its own, but for few rows. Two
# EPYC cores, 768 to 3072 values with the product: 128 rows 6.8 ms and 5.8, 1,024 rows 46.8 and
# 37.2. In a model of MiniLM's size 1 to 2 % are lost below 64 rows and 3 to 7 % won from 128 on.
# With AVX-512 the epilogue's takes 0.92 to 1.00 of the time of product and pass.
GELU_APART_FROM = 65 if torch.backends.cpu.get_cpu_capability() == "AVX2" else math.inf  # rows
_GELU_ = torch.ops.aten.gelu_.default

# Multiplications from which the gradient of a weight is oneDNN's. On two EPYC cores with AVX-512
# it takes 0.5 to 0.7 of the time of torch's BLAS, and a training step of a MiniLM 0.92; of smaller
# ones too little is gained for a primitive for every number of rows. With AVX2 the step takes 0.99
# to 1.01, and on others it was not tried. The gradient of the rows would gain as much, and err 1.4
# times as far as torch's over six layers, at places more than twice.
WEIGHT_GRADIENT_FROM = 2**22 if torch.backends.cpu.get_cpu_capability() == "AVX512" else math.inf

# Rows up to which they are rounded up to a multiple of the second number.
_LADDER = ((96, 4), (256, 8), (512, 16), (2048, 32), (math.inf, 128))

# Looked up once, and called by overload: either takes as long as a small product.
_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_known: dict[torch.dtype, bool] = {}  # a dict, because torch.compile cannot see into lru_cache


def available(dtype: torch.dtype = torch.float32) -> bool:
    """Whether the operators are there for one of `DTYPES`, give the right numbers, and oneDNN is
    switched on."""
    if not torch._C._get_mkldnn_enabled():  # torch.backends.mkldnn.flags changes it
        return False
    if dtype not in _known:
        _known[dtype] = torch.backends.mkldnn.is_available() and _works(dtype)
    return _known[dtype]


def product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """``activation(x @ weight.T + bias)``.

    Args:
        x: ``[..., in]``, one of `DTYPES`, as everything else.
        weight: ``[out, in]``, as it is or as `packed` has made it.
        bias: ``[out]`` or None.
        activation: one of `EPILOGUES`.

    Returns:
        ``[..., out]``.
    """
    if activation == "gelu" and _gelu_is_apart(x):
        return _GELU_(_LINEAR.default(x, weight, bias, "none", [], ""))
    attr, algorithm = EPILOGUES[activation]
    return _LINEAR.default(x, weight, bias, attr, [], algorithm)


def _gelu_is_apart(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.numel() // x.shape[-1] >= GELU_APART_FROM


def product_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """``x @ weight.T + bias + residual`` with a residual ``[..., out]``."""
    if x.dtype == torch.float32:  # behind the product, which is not slower
        return _LINEAR.default(x, weight, bias, "none", [], "").add_(residual)
    return _LINEAR.binary(x, residual, weight, bias, "add")  # one rounding less


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for ``[M, K]`` and ``[K, N]`` of any strides, without a gradient."""
    return _LINEAR.default(a, b.t(), None, "none", [], "")


def packed(weight: Tensor, rows: int = 128) -> Tensor:
    """A copy of ``weight [out, in]`` in the layout that oneDNN multiplies ``rows`` rows with.

    It takes any number of rows, and is opaque: nothing but `product` and `product_add` reads it.
    """
    return torch.ops.mkldnn._reorder_linear_weight.default(weight.detach().contiguous(), rows)


def nbytes(weight: Tensor) -> int:
    """Memory of what `packed` has made, which is opaque to torch's own ``nbytes``."""
    return weight.dtype.itemsize * weight.numel()


def bucket_of(rows: int) -> int:
    """How many rows are given to what oneDNN prepares for a number of rows.

    oneDNN makes a primitive for every new number: 0.3 to 0.6 ms and 0.5 to 0.7 MB each on an EPYC,
    four in a model. A ladder makes new ones rare where that is long beside the products, whose time
    grows with every row. It adds three rows up to 96 and seven up to 256, then a sixteenth at most,
    and has 156 steps up to 8,192 rows, which make less than two thirds of as many primitives as
    oneDNN keeps. Beside steps of eight up to 64 and of sixteen behind them, all lengths from 1 to
    96 in random order take 0.96 of their time in a frozen MiniLM, and those from 97 to 256 0.98.
    """
    step = next(step for most, step in _LADDER if rows <= most)
    return -(-rows // step) * step


def blocks(weight: Tensor) -> list[tuple[int, int]]:
    """Where what `packed` has made lies in memory, as addresses and numbers of bytes; empty where
    this torch does not tell."""
    operators = torch.ops.mkldnn
    try:
        return [(operators.data_ptr.default(weight), operators._nbytes.default(weight))]
    except (AttributeError, RuntimeError):
        return []


def _works(dtype: torch.dtype) -> bool:
    generator = torch.Generator("cpu").manual_seed(0)
    plain = {"dtype": torch.float32, "device": "cpu"}  # whatever somebody has as a default
    x, weight, bias, residual = (
        torch.randn(*shape, generator=generator, **plain)
        for shape in ((5, 32), (16, 32), (16,), (5, 16))
    )
    total = F.linear(x, weight, bias)
    expected = (total, F.gelu(total), F.relu(total), total + residual)
    x, weight, bias, residual = (t.to(dtype) for t in (x, weight, bias, residual))
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        with torch.inference_mode():
            actual = [
                (*(product(x, w, bias, activation) for activation in EPILOGUES),
                 product_add(x, w, bias, residual))
                for w in (weight, packed(weight))
            ]  # fmt: skip
    except (AttributeError, RuntimeError, TypeError):
        return False
    allowed = 1e-5 if dtype == torch.float32 else 0.1  # of results that are 6 on average
    return all(
        torch.allclose(a.float(), b, atol=allowed)
        for found in actual
        for a, b in zip(found, expected, strict=True)
    )
