"""What a layer in inference calls, for who has found out once that it is all there is.

`fastbert.ops.attention_varlen`, `linear_add_norm` and `linear` look at their arguments and at what
surrounds the call, every time. For small batches that takes longer than the GPU does. A caller with
many layers asks `only_kernels` or `only_onednn` once: the first allows `LayerLaunches`, the second
the products of `fastbert.ops.onednn`.
"""

from __future__ import annotations

from functools import partial
from itertools import repeat
from operator import attrgetter, eq, is_

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import PackedBatch
from . import onednn
from .attention_kernels import MAX_HEAD_SIZE, parts_of
from .backend import resolve
from .linear import plain_on_cpu, route, rows_on_onednn
from .registry import takes_launches
from .repeated import Repeated

__all__ = ["LayerLaunches", "only_kernels", "only_onednn"]

_DTYPE = attrgetter("dtype")


def only_kernels(rows: Tensor, weights: list[Tensor], head_size: int) -> bool:
    """Whether a layer on these rows is nothing but products of the library and kernels.

    Args:
        rows: ``[T, E]``.
        weights: all tensors of all layers, and a bias of the scores.
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


class LayerLaunches:
    """The kernels of a layer, launched for one layer after the other.

    Layers whose tensors have the same sizes launch the same kernels on other addresses, so all but
    the first one's are made again as they were noted, and into the memory of the first one's
    results: each is read by what follows in its layer or by the first steps of the next one, and
    then free.

    Args:
        batch: the sequences of all rows, with a bias or without.
        scale: factor for the scores.
        head_size: of attention.
        activation: one of `fastbert.ops.linear.ACTIVATIONS`.
        eps: of the norm after attention, and of the last one.
        keep_sum: what is normed is read as well, so `linear_add_norm` gives it too.
    """

    def __init__(
        self,
        batch: PackedBatch,
        scale: float,
        head_size: int,
        activation: str,
        eps: tuple[float, float],
        keep_sum: bool = False,
    ):
        from ..kernels.attention import attention_varlen_fwd
        from ..kernels.layernorm import layernorm_fwd
        from ..kernels.linear import bias_activation_fwd_

        def attend(*rows: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (-1, head_size)) for t in rows)
            parts = [
                (each.tile_map(tile.block_m), tile)
                for each, tile in parts_of(q, batch, batch, batch.bias is not None)
            ]
            starts = batch.cu_seqlens
            out, _ = attention_varlen_fwd(
                q, k, v, starts, starts, parts, scale=scale, bias=batch.bias
            )
            return out.flatten(1)

        def add_norm(at: int, x: Tensor, residual: Tensor, *tensors: Tensor | None):
            found = layernorm_fwd(x, residual, *tensors, eps=eps[at], keep_sum=keep_sum)
            return found[:2] if keep_sum else found[0]

        self._activation = activation
        self._fused: bool | None = None
        self._attend = Repeated(attend, fresh=False)
        self._add_norm = [Repeated(partial(add_norm, at), fresh=False) for at in (0, 1)]
        activate = partial(bias_activation_fwd_, activation=activation)
        self._activate = Repeated(activate, fresh=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`fastbert.ops.attention_varlen` of rows ``[T, E]``."""
        return self._attend(q, k, v)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``activation(x @ weight.T + bias)`` of rows ``[T, E]``."""
        if self._fused is None:
            self._fused = route(x, weight) == "fused"
        if self._fused:
            from ..kernels.linear import linear_activation_fwd

            return linear_activation_fwd(x, weight, bias, activation=self._activation)
        return self._activate(F.linear(x, weight), bias)

    def linear_add_norm(
        self,
        at: int,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``LayerNorm(x @ weight.T + bias + residual)`` of rows ``[T, F]`` and ``[T, E]``.

        Args:
            at: 0 for the norm after attention, 1 for the last one.

        Returns:
            It, ``[T, E]``; with ``keep_sum`` also what is normed.
        """
        return self._add_norm[at](F.linear(x, weight), residual, bias, norm_weight, norm_bias)
