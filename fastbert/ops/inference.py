"""What a layer in inference calls, for who has found out once that it is all there is.

`fastbert.ops.attention_varlen`, `linear_add_norm` and `linear` look at their arguments and at what
surrounds the call, every time. For small batches that takes longer than the GPU does. A caller with
many layers asks `only_kernels` or `only_onednn` once: the first allows the launches below, the
second the products of `fastbert.ops.onednn`.
"""

from __future__ import annotations

from itertools import repeat
from operator import attrgetter, eq, is_

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import PackedBatch
from . import onednn
from .attention_kernels import MAX_HEAD_SIZE, tile_for
from .backend import resolve
from .linear import plain_on_cpu, route, rows_on_onednn
from .registry import takes_launches

__all__ = [
    "launch_attention",
    "launch_linear",
    "launch_linear_add_norm",
    "only_kernels",
    "only_onednn",
]

_DTYPE = attrgetter("dtype")


def only_kernels(rows: Tensor, weights: list[Tensor], head_size: int) -> bool:
    """Whether a layer on these rows is nothing but products of the library and kernels.

    Args:
        rows: ``[T, E]``.
        weights: all tensors of all layers.
        head_size: of attention.
    """
    return (
        not torch.is_grad_enabled()
        and rows.numel() > 0
        and takes_launches((rows,))
        and not torch.is_autocast_enabled(rows.device.type)
        and head_size <= MAX_HEAD_SIZE
        and resolve(rows.device, rows.dtype) == "triton"
        and all(map(is_, map(_DTYPE, weights), repeat(rows.dtype)))
        and all(map(eq, map(Tensor.get_device, weights), repeat(rows.get_device())))
    )


def only_onednn(rows: Tensor, weights: list[Tensor]) -> bool:
    """Whether a layer on these rows is nothing but oneDNN's products and attention in torch.

    Args:
        rows: ``[T, E]``.
        weights: all tensors of all layers.
    """
    return (
        not torch.is_grad_enabled()
        and rows_on_onednn(rows, onednn.DTYPES)
        and all(map(is_, map(_DTYPE, weights), repeat(rows.dtype)))
        and all(map(plain_on_cpu, weights))
    )


def launch_attention(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, scale: float) -> Tensor:
    """`fastbert.ops.attention_varlen` of q, k and v ``[T, H, D]``."""
    from ..kernels.attention import attention_varlen_fwd

    tile = tile_for(q, batch.max_seqlen, batch.max_seqlen)
    return attention_varlen_fwd(
        q, k, v, batch.cu_seqlens, batch.cu_seqlens, batch.tile_map(tile.block_m), tile,
        scale=scale,
    )[0]  # fmt: skip


def launch_linear_add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """``LayerNorm(x @ weight.T + bias + residual)`` of rows ``[T, F]`` and ``[T, E]``."""
    from ..kernels.layernorm import layernorm_fwd

    x = F.linear(x, weight)
    return layernorm_fwd(x, residual, bias, norm_weight, norm_bias, eps=eps)[0]


def launch_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``activation(x @ weight.T + bias)`` of rows ``[T, E]``."""
    from ..kernels.linear import bias_activation_fwd_, linear_activation_fwd

    if route(x, weight) == "fused":
        return linear_activation_fwd(x, weight, bias, activation=activation)
    return bias_activation_fwd_(F.linear(x, weight), bias, activation=activation)
