"""Layers in inference from copies of their weights, for who promises that the weights stay.

This is the one place that keeps copies of weights. On a CPU in fp32 and bf16 they are in the layout
that oneDNN multiplies with, so that no call reorders them, and q, k and v are one product;
elsewhere nothing is copied and layers run as they do.

A promise may be broken: in every call the weights are compared with what was copied, by memory and
by torch's count of changes in place, and copied again where they differ. Changes that torch does
not count (through ``.data``, through a numpy view) need `Frozen.forget`.
"""

from __future__ import annotations

import logging
import threading
from operator import attrgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .encoder import Layers, LayerWeights, Norm, encode_layers
from .ops import activate, onednn
from .ops.attention_torch import varlen_in_torch
from .ops.linear import plain_on_cpu, rows_on_onednn
from .packing import PackedBatch, PaddedBatch

__all__ = ["Frozen", "bucket_of"]

_log = logging.getLogger("fastbert")
_VERSION = attrgetter("_version")


def bucket_of(rows: int) -> int:
    """How many rows the products of a batch are given.

    oneDNN makes a primitive for every new number: 0.2 to 0.7 ms each on an EPYC, four in a model. A
    ladder makes new ones rare, 24 of them up to 512 rows, and adds seven rows or a quarter at most.
    """
    step = 8 if rows <= 64 else 16 if rows <= 256 else 64 if rows <= 2048 else 256
    return -(-rows // step) * step


class _Product(NamedTuple):
    """A linear layer as oneDNN wants it."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, *parts: tuple[Tensor, Tensor | None]) -> _Product:
        """Of linear layers over the same rows, their results side by side."""
        if len(parts) == 1:
            ((weight, bias),) = parts
            return cls(onednn.packed(weight), bias)
        weight = torch.cat([weight for weight, _ in parts])
        if all(bias is None for _, bias in parts):
            return cls(onednn.packed(weight), None)
        biases = [w.new_zeros(w.shape[0]) if b is None else b for w, b in parts]
        return cls(onednn.packed(weight), torch.cat(biases))


class _Layer(NamedTuple):
    """A layer of `LayerWeights`, its four weights copied."""

    qkv: _Product
    attention_output: _Product
    attention_norm: Norm
    intermediate: _Product
    activation: str
    output: _Product
    output_norm: Norm
    head_size: int
    scale: float

    @classmethod
    def of(cls, weights: LayerWeights) -> _Layer:
        return cls(
            _Product.of(*weights.qkv),
            _Product.of(weights.attention_output),
            weights.attention_norm,
            _Product.of(weights.intermediate),
            weights.activation,
            _Product.of(weights.output),
            weights.output_norm,
            weights.head_size,
            weights.scale,
        )

    def __call__(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """`fastbert.encoder.encode_layer`; rows behind those of the batch may hold anything."""
        qkv = onednn.product(hidden, *self.qkv, None)
        count, more = batch.num_tokens, hidden.shape[0] - batch.num_tokens
        qkv = (qkv[:count] if more else qkv).view(count, 3, -1, self.head_size)
        context = self._attend(qkv, batch)
        context = F.pad(context, (0, 0, 0, more)) if more else context
        total = onednn.product_add(context, *self.attention_output, hidden)
        hidden = _normed(total, self.attention_norm)
        fused = self.activation if self.activation in onednn.EPILOGUES else None
        inner = onednn.product(hidden, *self.intermediate, fused)
        if fused is None:
            inner = activate(inner, self.activation)
        return _normed(onednn.product_add(inner, *self.output, hidden), self.output_norm)

    def _attend(self, qkv: Tensor, batch: PackedBatch) -> Tensor:
        """``[T, 3, H, D]`` -> ``[T, E]``."""
        if len(set(batch.lengths)) > 1:
            q, k, v = qkv.unbind(1)
            return varlen_in_torch(q, k, v, batch, batch, self.scale, 0.0, False).flatten(1)
        # As there, in a third of the calls: with few tokens they are most of it.
        by_head = qkv.view(len(batch.lengths), -1, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(*by_head.unbind(), scale=self.scale)
        return context.transpose(1, 2).reshape(qkv.shape[0], -1)


def _normed(total: Tensor, norm: Norm) -> Tensor:
    return F.layer_norm(total, total.shape[-1:], norm.weight, norm.bias, norm.eps)


class _Copies(NamedTuple):
    """What was made of some layers, or that nothing could be made.

    Attributes:
        of: the tensors that were copied; norms and most biases are used as they are.
        stamp: `_stamp` of those.
    """

    layers: Layers
    of: list[Tensor]
    stamp: list | None
    each: list[_Layer] | None

    def still(self, layers: Layers) -> bool:
        return self.layers is layers and self.stamp == _stamp(self.of)


class Frozen:
    """Runs the layers of one model from copies of their weights where that is a gain.

    May be called from several threads. A copy of it, as of a model that is copied or pickled, has
    no copies of weights yet.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._made: _Copies | None = None

    def __reduce__(self):
        return Frozen, ()

    def __call__(self, rows: Tensor, batch: PackedBatch | PaddedBatch, layers: Layers) -> Tensor:
        """`fastbert.encoder.encode_layers`, whose arguments these are."""
        takes = (
            isinstance(batch, PackedBatch)
            and layers.tensors
            and rows.dtype == layers.tensors[0].dtype
            and rows_on_onednn(rows, onednn.DTYPES)
        )
        copies = self._copies(layers) if takes else None
        if self._made and (rows.dtype not in onednn.DTYPES or rows.device.type != "cpu"):
            self.forget()  # the model has moved to where there are none
        if copies is None or torch.is_grad_enabled():
            return encode_layers(rows, batch, layers)
        count = rows.shape[0]
        more = bucket_of(count) - count
        rows = F.pad(rows, (0, 0, 0, more)) if more else rows
        for layer in copies:
            rows = layer(rows, batch)
        return rows[:count]

    @property
    def nbytes(self) -> int:
        """Memory of the copies."""
        layers = self._made.each if self._made else None
        products = [part for x in layers or () for part in x if isinstance(part, _Product)]
        return sum(p.weight.dtype.itemsize * p.weight.numel() for p in products)

    def forget(self) -> None:
        """Give up the copies and their memory. They are made again when they are needed."""
        with self._lock:
            self._made = None

    def _copies(self, layers: Layers) -> list[_Layer] | None:
        """The copies, made now if they are of other weights; None if there can be none."""
        made = self._made
        if made is None or not made.still(layers):
            with self._lock:  # somebody else may have made them meanwhile
                made = self._made
                if made is None or not made.still(layers):
                    made = self._make(layers)
        return made.each

    def _make(self, layers: Layers) -> _Copies:
        if self._made is not None:
            _log.info("fastbert copies frozen weights again, since some have changed")
        self._made = each = None  # not both in memory
        of = [t for weights in layers.each for t in _copied(weights)]
        stamp = _stamp(of)
        (dtype, *others) = {t.dtype for t in layers.tensors}
        known = dtype in onednn.DTYPES and not others and all(map(plain_on_cpu, layers.tensors))
        if known and stamp is not None:
            # Outside of inference mode, whose tensors a call with gradients could not read.
            with torch.inference_mode(False), torch.no_grad():
                each = [_Layer.of(weights) for weights in layers.each]
        self._made = _Copies(layers, of, stamp, each)
        return self._made


def _copied(weights: LayerWeights) -> list[Tensor]:
    """The tensors that `_Layer.of` copies."""
    linears = (weights.attention_output, weights.intermediate, weights.output)
    joined = [t for part in weights.qkv for t in part if t is not None]
    return [*joined, *(linear.weight for linear in linears)]


def _stamp(tensors: list[Tensor]) -> list | None:
    """What a change of a tensor changes, by whomever; None where torch counts no changes."""
    try:
        return [*map(Tensor.data_ptr, tensors), *map(_VERSION, tensors)]
    except RuntimeError:  # made in inference mode
        return None
