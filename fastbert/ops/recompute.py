"""Rows that backward makes again instead of keeping them.

A LayerNorm keeps the sum it normalises and two numbers a row, for its own gradient. Its result is
what the next product reads, and autograd would keep that as well. `remember` notes on the result
how it was made; a product asks `kept` what it has to keep, which then is the sum that is kept
anyway, and `remade` gives the rows in backward, for one pass over memory and no product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import define
from .repeated import Run, once

__all__ = ["kept", "remade", "remember"]

_NOTE = "_fastbert_made_from"


def _launch(
    z: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    from ..kernels.layernorm import layernorm_again

    return layernorm_again(z, statistics, weight, bias, out_dtype=dtype)


_layer_norm_again = define(
    "layer_norm_again(Tensor z, Tensor statistics, Tensor? weight, Tensor? bias, "
    "ScalarType dtype) -> Tensor",
    _launch,
    lambda z, statistics, weight, bias, dtype: z.new_empty(z.shape, dtype=dtype),
)


def remember(
    y: Tensor, z: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Note on ``y``, which is returned, that it is the norm of ``z``."""
    setattr(y, _NOTE, (y._version, (z, statistics, weight, bias)))
    return y


def kept(x: Tensor) -> tuple[Tensor | None, ...]:
    """What to save for backward so that `remade` can give ``x``: itself, or what it is made of."""
    version, tensors = getattr(x, _NOTE, (None, ()))
    return tensors if version == x._version else (x,)


def remade(tensors: tuple[Tensor | None, ...], dtype: torch.dtype, run: Run = once) -> Tensor:
    """The rows ``[M, N]`` for which `kept` gave these tensors, contiguous in the last dimension."""
    if len(tensors) == 1:
        x = tensors[0]
        return x.reshape(-1, x.shape[-1]).to(dtype)
    return run(_layer_norm_again, *tensors, dtype)
