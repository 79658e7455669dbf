"""Layers in inference from copies of their weights, for who promises that the weights stay.

This is the one place that keeps copies of weights. On a CPU in fp32 and bf16 they are in the layout
that oneDNN multiplies with, so that no call reorders them, and q, k and v are one product; in int8,
for who asks for it, a quarter of the memory and another result. Elsewhere nothing is copied and
layers run as they do. Copies lie in huge pages where the system has some, and memory that a call
frees is kept for the next one (`fastbert.memory`).

A promise may be broken: in every call the weights are compared with what was copied, by memory and
by torch's count of changes in place, and copied again where they differ. Changes that torch does
not count (through ``.data``, through a numpy view) need `Frozen.forget`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from itertools import chain
from operator import attrgetter
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import memory
from .encoder import encode_layers, encode_on_onednn
from .ops import onednn, onednn_int8
from .ops.linear import plain_on_cpu, rows_on_onednn
from .packing import PackedBatch, PaddedBatch
from .weights import Layers, LayerWeights, Linear

__all__ = ["FORMS", "Frozen"]

# What ``frozen`` may be -> what multiplies with the copies.
FORMS: dict[bool | str, ModuleType] = {True: onednn, "int8": onednn_int8}
_log = logging.getLogger("fastbert")
_VERSION = attrgetter("_version")


def _of_copies(weights: LayerWeights, products: ModuleType) -> LayerWeights:
    """The same layer, its products from copies of their weights, q, k and v joined."""
    names = ("attention_output", "intermediate", "output")
    linears = {name: _packed(products, getattr(weights, name)) for name in names}
    return weights._replace(qkv=(_packed(products, *weights.qkv),), **linears)


def _packed(products: ModuleType, *parts: Linear) -> Linear:
    """Linear layers over the same rows as one that oneDNN multiplies with."""
    if len(parts) == 1:
        ((weight, bias),) = parts
        return Linear(products.packed(weight), bias)
    weight = products.packed(torch.cat([weight for weight, _ in parts]))
    if all(bias is None for _, bias in parts):
        return Linear(weight, None)
    return Linear(
        weight, torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in parts])
    )


def _linears_of(each: Iterable[LayerWeights]) -> list[Linear]:
    """The products of layers that `_of_copies` has made."""
    return [x for w in each for x in (*w.qkv, w.attention_output, w.intermediate, w.output)]


class _Copies(NamedTuple):
    """What was made of some layers, or that nothing could be made.

    Attributes:
        of: the tensors that were copied; norms and most biases are used as they are.
        stamp: `_stamp` of those.
    """

    layers: Layers
    of: list[Tensor]
    stamp: list | None
    each: list[LayerWeights] | None

    def still(self, layers: Layers) -> bool:
        return self.layers is layers and self.stamp == _stamp(self.of)


class Frozen:
    """Runs the layers of one model from copies of their weights where that is a gain.

    May be called from several threads. A copy of it, as of a model that is copied or pickled, has
    no copies of weights yet.

    Args:
        form: one of `FORMS`.

    Attributes:
        form: that.

    Raises:
        ValueError: it is none, or this torch does not have its products.
    """

    def __init__(self, form: bool | str = True):
        if form not in FORMS:
            raise ValueError(f"frozen: expected True, False or 'int8', got {form!r}")
        if form == "int8" and not onednn_int8.available():
            raise ValueError("frozen='int8': this build of torch has no products in int8 (oneDNN)")
        self.form, self._products = form, FORMS[form]
        self._lock = threading.Lock()
        self._made: _Copies | None = None
        self._said = False

    def __reduce__(self):
        return Frozen, (self.form,)

    def __call__(self, rows: Tensor, batch: PackedBatch | PaddedBatch, layers: Layers) -> Tensor:
        """`fastbert.encoder.encode_layers`, whose arguments these are."""
        takes = (
            isinstance(batch, PackedBatch)
            and layers.tensors
            and rows.dtype == layers.tensors[0].dtype
            and rows_on_onednn(rows, self._products.DTYPES)
        )
        copies = self._copies(layers) if takes else None
        if self._made and (rows.dtype not in self._products.DTYPES or rows.device.type != "cpu"):
            self.forget()  # the model has moved to where there are none
        if copies is None and self.form == "int8" and not self._said:
            self._said = True
            _log.warning(
                "fastbert: frozen='int8' has no effect here, layers run as they are: it is for "
                "fp32 on a CPU, without autocast or the backend triton, and for layers of plain "
                "weights"
            )
        if copies is None or torch.is_grad_enabled():
            return encode_layers(rows, batch, layers)
        return encode_on_onednn(rows, batch, copies, self._products)

    @property
    def nbytes(self) -> int:
        """Memory of the copies."""
        each = self._made.each if self._made else None
        return sum(self._products.nbytes(x.weight) for x in _linears_of(each or ()))

    def forget(self) -> None:
        """Give up the copies and their memory. They are made again when they are needed."""
        with self._lock:
            self._made = None

    def _copies(self, layers: Layers) -> list[LayerWeights] | None:
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
        known = (
            dtype in self._products.DTYPES and not others and all(map(plain_on_cpu, layers.tensors))
        )
        if known and stamp is not None:
            memory.keep_freed()
            # Outside of inference mode, whose tensors a call with gradients could not read.
            with torch.inference_mode(False), torch.no_grad():
                each = [_of_copies(weights, self._products) for weights in layers.each]
            copies = (x.weight for x in _linears_of(each))
            memory.to_huge_pages(chain.from_iterable(map(self._products.blocks, copies)))
        self._made = _Copies(layers, of, stamp, each)
        return self._made


def _copied(weights: LayerWeights) -> list[Tensor]:
    """The tensors that `_of_copies` copies."""
    linears = (weights.attention_output, weights.intermediate, weights.output)
    joined = [t for part in weights.qkv for t in part if t is not None]
    return [*joined, *(linear.weight for linear in linears)]


def _stamp(tensors: list[Tensor]) -> list | None:
    """What a change of a tensor changes, by whomever; None where torch counts no changes."""
    try:
        return [*map(Tensor.data_ptr, tensors), *map(_VERSION, tensors)]
    except RuntimeError:  # made in inference mode
        return None
