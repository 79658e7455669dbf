"""What sentence-transformers' modules around a model ask of it, as twins of their classes.

- `Expanding`: queries of a multi-vector model (ColBERT, Khattab and Zaharia, 2004.12832) are filled
  up with tokens that look at the query, are not looked at, and whose vectors count. In the
  attention mask they are padding; they are computed.
- `Feeding` and `Pooling`: a masked-LM model and SPLADE's pooling behind it, one after the other,
  without a tensor of all logits between them.

Imported only where sentence-transformers is, by `fastbert.accelerate`.
"""

from __future__ import annotations

import copyreg
import threading
from abc import ABCMeta
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import Tensor, nn

from .in_flight import calling
from .masked_lm import MaskedLMHead
from .model import requesting

__all__ = ["to_twins"]

_ARGUMENTS = (
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
)  # fmt: skip
_LOGITS = "token_embeddings"  # by this name they go from one module to the next


class _Thread(threading.local):
    """Whether this thread is inside a call of a `Whole`."""

    inside = False


_thread = _Thread()


class _MadeHere(ABCMeta):
    """Type of the twins, which are pickled as what they are made of."""


@cache
def _twin(ours: type, theirs: type[nn.Module]) -> type[nn.Module]:
    """A subclass of ``theirs`` with the methods of ``ours``.

    It bears the name of ``theirs``, which is what is written down when a module is saved, and has
    no other base, so that a module can change its class for it.
    """
    namespace = {"__module__": theirs.__module__, "__doc__": theirs.__doc__}
    methods = {name: value for name, value in vars(ours).items() if callable(value)}
    return _MadeHere(
        theirs.__name__, (theirs,), {**methods, **namespace, "ours": ours, "theirs": theirs}
    )


copyreg.pickle(_MadeHere, lambda made: (_twin, (made.ours, made.theirs)))


class Expanding:
    """A model that computes the tokens that fill up queries."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        expansion = self.query_expansion or {}
        if "query_expansion_positions" not in features or expansion.get("attend"):
            return self.theirs.forward(self, features, **kwargs)
        with requesting(self.model, keep_padding=True):
            return self.theirs.forward(self, features, **kwargs)


class _Unpooled(NamedTuple):
    """Stands for logits whose pooling comes next."""

    model: MaskedLMHead
    inputs: dict[str, Any]


class Feeding:
    """A masked-LM model whose logits are pooled by what comes next."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        if torch.compiler.is_compiling():
            return self.theirs.forward(self, features, **kwargs)
        logits = features.get("modality", "text") == "text" and self.module_output_name == _LOGITS
        pooled = _thread.inside and not kwargs  # alone it gives logits, as ever
        if not (pooled and logits and isinstance(self.model, MaskedLMHead)):
            return self.theirs.forward(self, features, **kwargs)
        inputs = {name: features[name] for name in _ARGUMENTS if name in features}
        return {**features, _LOGITS: _Unpooled(self.model, inputs)}


class Pooling:
    """SPLADE's pooling of what a `Feeding` model gives."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        found = features.get(_LOGITS)
        if not isinstance(found, _Unpooled):
            return self.theirs.forward(self, features)
        pooled: Tensor = found.model.splade(
            **found.inputs, pooling=self.pooling_strategy, activation=self.activation_function
        )
        if self.embedding_dimension is None:
            self.embedding_dimension = pooled.shape[1]
        features = {name: value for name, value in features.items() if name != _LOGITS}
        return {**features, "sentence_embedding": pooled}


class Whole:
    """A pipeline with a `Feeding` model inside."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.theirs.__call__(self, *args, **kwargs)
        with calling(self):  # so that nobody undoes one of its modules in between
            if not isinstance(type(self), _MadeHere):
                return self(*args, **kwargs)
            before, _thread.inside = _thread.inside, True
            try:
                return self.theirs.__call__(self, *args, **kwargs)
            finally:
                _thread.inside = before


def _steps(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Modules of pipelines inside ``model``, each with the one that comes next."""
    for container in model.modules():
        if isinstance(container, nn.Sequential):
            steps = list(container)
            yield from zip(steps, [*steps[1:], None], strict=True)


def to_twins(model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
    """Give sentence-transformers' modules inside ``model``, itself included, their twins' classes.

    Returns:
        The modules that changed, with the class each had before.
    """
    wanted: dict[nn.Module, type] = {}
    for step, following in _steps(model):
        if not isinstance(step, Transformer) or isinstance(type(step), _MadeHere):
            continue
        forwards = getattr(type(step), "forward", None), getattr(type(following), "forward", None)
        if forwards == (Transformer.forward, SpladePooling.forward):
            wanted |= {step: Feeding, following: Pooling}
            if isinstance(model, BaseModel):
                wanted[model] = Whole
        else:
            wanted.setdefault(step, Expanding)
    changed = [(module, type(module)) for module in wanted]
    for module, ours in wanted.items():
        module.__class__ = _twin(ours, type(module))
    return changed
