"""The weights of a model as they were read last time, for as long as they are the same.

Where no hook watches and nobody stands in between (`fastbert.families.obstacle` has looked),
reading a layer's modules takes as long as launching it, so it is done once. Tensors are never
copied; who replaces one, or changes a number that a layer computes with, is noticed at the next
call. If no hidden state is asked for, and no layer is to be computed again in backward, nothing has
to be called but the layers' arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat
from operator import contains, is_, itemgetter, methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..weights import Layers, LayerWeights, Linear
from . import known
from .inputs import read_sums
from .obstacle import Found, is_remembered

__all__ = ["Plan", "plan_of"]

_PLAN, _TRAINING_PLAN = "_fastbert_plan", "_fastbert_training_plan"
_PARAMETERS = itemgetter("_parameters")
# What a layer computes with beside parameters and modules, by who holds it.
_NUMBERS: dict[type[nn.Module], Callable[[dict], Any]] = {
    nn.LayerNorm: itemgetter("eps", "normalized_shape"),
    nn.Dropout: itemgetter("p", "training"),
    nn.Embedding: itemgetter("padding_idx", "max_norm", "sparse", "scale_grad_by_freq"),
}


class Plan:
    """Weights of layers, and what they were read from.

    Attributes:
        layers: in their order.
        by_layer: by their modules.
        sums: what the embeddings compute with, where that is tensors and numbers alone.
        whole: whether all of their tensors are parameters, which are compared; a weight that
            another network makes is set as a plain attribute, and has to be read in every call.
        recomputes: whether a wrapper computes something again in backward, for which layers have to
            be called.
    """

    def __init__(self, model: nn.Module, found: Found, layers: list[nn.Module], read: Callable):
        family = model.family
        self.found, self._training = found, torch.is_grad_enabled()
        self._dicts = [layer.__dict__ for layer in layers]
        projection = family.projection_of(model)
        parts = [*layers, model.embeddings, *([] if projection is None else [projection])]
        inside = [m for part in parts for m in part.modules()]
        owners = [m for m in inside if m._parameters]
        self._owners = [m.__dict__ for m in owners]
        self._tables = [m._parameters for m in owners]
        self._places = [table for table in self._tables for _ in table]
        self._names = [name for table in self._tables for name in table]
        self._tensors = list(map(dict.get, self._places, self._names))
        self._numbers = [
            (get, m.__dict__) for m in inside for cls, get in _NUMBERS.items() if isinstance(m, cls)
        ]
        owner, _, name = family.parts.activation.rpartition(".")
        for layer in layers:
            attention = layer.get_submodule(family.parts.attention)
            self._numbers.append((methodcaller("get", "scaling"), attention.__dict__))
            self._numbers.append((itemgetter("attention_head_size"), attention.__dict__))
            # A function, where it is no module.
            self._numbers.append((methodcaller("get", name), layer.get_submodule(owner).__dict__))
        called = family.encoder_of(model).modules()
        self.recomputes = any(known.unwrapped(m) is not m for m in called)
        self._configs = {id(m.config): m.config for m in inside if hasattr(m, "config")}.values()
        self._values = self._read()
        self.by_layer = {layer: read(layer) for layer in layers}
        self.layers = Layers([self.by_layer[layer] for layer in layers])
        compared = set(map(id, self._tensors))
        self.whole = compared.issuperset(map(id, _tensors_in(tuple(self.by_layer.values()))))
        sums = read_sums(model)
        tensors = _tensors_in((sums.tensors, sums.projection))
        plain = sums.tensors is not None and isinstance(sums.projection, Linear | None)
        self.sums = sums if plain and compared.issuperset(map(id, tensors)) else None

    def _read(self) -> list[Any]:
        implementations = [config._attn_implementation for config in self._configs]
        numbers = [get(attributes) for get, attributes in self._numbers]
        if self._training:  # which products are one depends on whose gradient is wanted
            numbers += [t is not None and t.requires_grad for t in self._tensors]
        return implementations + numbers

    def still(self) -> bool:
        """Whether reading the layers again would give the same."""
        return (
            all(map(is_, map(_PARAMETERS, self._owners), self._tables))
            and all(map(is_, map(dict.get, self._places, self._names), self._tensors))
            and self._read() == self._values
        )

    @property
    def compiled(self) -> bool:
        """Whether somebody compiled a layer by itself, which has to be called then."""
        return any(map(contains, self._dicts, repeat("_compiled_call_impl")))

    def __reduce__(self):
        return known._nothing, ()  # a copy or an unpickled model reads for itself


def _tensors_in(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, tuple):
        for inner in part:
            yield from _tensors_in(inner)


def plan_of(
    model: nn.Module, found: Found, read: Callable[[nn.Module], LayerWeights]
) -> Plan | None:
    """The weights of all layers for this call, or None where each has to be read when it is called.

    Args:
        found: what `fastbert.families.obstacle.examine` says now, without a reason.
        read: reads one layer.
    """
    if torch.compiler.is_compiling() or _has_any_global_hook() or not is_remembered(model, found):
        return None
    family = model.family
    if "_compiled_call_impl" in family.encoder_of(model).__dict__:
        return None
    name = _TRAINING_PLAN if torch.is_grad_enabled() else _PLAN
    plan = model.__dict__.get(name)
    if plan is None or plan.found is not found or not plan.still():
        layers = list(map(known.unwrapped, family.layers(model)))
        tensors = [p for layer in layers for p in layer.parameters()]
        if not all(type(p) in (nn.Parameter, Tensor) for p in tensors):
            return None
        plan = model.__dict__[name] = Plan(model, found, layers, read)
        other = _PLAN if name == _TRAINING_PLAN else _TRAINING_PLAN
        kept = model.__dict__.get(other)  # None also in a copy
        if kept is not None and not kept.still():
            del model.__dict__[other]  # it holds weights that nobody else may hold any more
    return plan if plan.whole and not plan.compiled else None
