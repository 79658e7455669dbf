"""What the layers of an encoder compute with: tensors, or functions in their place, and numbers.

There are no modules here and no transformers; `fastbert.families` reads a layer's modules into
these, and `fastbert.encoder` computes with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

__all__ = ["LayerWeights", "Layers", "Linear", "Norm", "Projection", "Stacked"]


class Linear(NamedTuple):
    """A linear layer as its tensors: ``weight [out, in]``, ``bias [out]``."""

    weight: Tensor
    bias: Tensor | None


class Stacked(NamedTuple):
    """Several linear layers over the same rows, to be computed as one product."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]


class Norm(NamedTuple):
    """A LayerNorm as its tensors: ``weight [E]``, ``bias [E]``."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


# What stands in a linear layer's place: its tensors, or any function of rows (a LoRA layer, a
# quantised linear), which cannot tell packed rows from another batch.
Projection = Linear | Callable[[Tensor], Tensor]


class LayerWeights(NamedTuple):
    """Everything one layer computes with.

    Attributes:
        qkv: the three input projections, as one product or one by one; for `encode_on_onednn` also
            one whose weight holds all three.
        attention_output, attention_norm: the projection after attention and the norm after it.
        intermediate, activation: the first feed-forward product and what follows it, one of
            `fastbert.ops.linear.ACTIVATIONS` or any function.
        output, output_norm: the second feed-forward product and the norm after it.
        head_size: size of an attention head; how many there are follows from the projection.
        scale: factor for the scores.
        attention_dropout, hidden_dropout, output_dropout: probabilities, 0 outside training.
        unfused: attention in torch runs as operations that have second derivatives.
        pre_norm: the norms are in front of attention and of the feed-forward part, and not behind
            what is added up.
    """

    qkv: Stacked | tuple[Projection, Projection, Projection] | tuple[Linear]
    attention_output: Projection
    attention_norm: Norm | Callable[[Tensor], Tensor]
    intermediate: Projection
    activation: str | Callable[[Tensor], Tensor]
    output: Projection
    output_norm: Norm | Callable[[Tensor], Tensor]
    head_size: int
    scale: float
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    output_dropout: float = 0.0
    unfused: bool = False
    pre_norm: bool = False


class Layers:
    """The layers of an encoder.

    Attributes:
        each: their weights.
        tensors: all tensors in them if they are for inference and nothing else is in them, else
            None.
        alike: whether they are the same but for the values in these tensors.
        trained: for each the tensors in it, if they are for training, are `alike` and nothing else
            is in them, else None.
    """

    def __init__(self, each: list[LayerWeights]):
        self.each = each
        found = [_tensors_of(weights) for weights in each]
        self.tensors = None if None in found else [t for tensors in found for t in tensors]
        self.alike = self.tensors is not None and _are_alike(each)
        trained = [_trained_tensors_of(weights) for weights in each]
        self.trained = None if None in trained or not _are_alike(each) else trained


def _tensors_of(weights: LayerWeights) -> list[Tensor] | None:
    """What a layer without dropout computes with, if it is tensors and a named activation."""
    if isinstance(weights.qkv, Stacked):
        return None
    linears = (*weights.qkv, weights.attention_output, weights.intermediate, weights.output)
    norms = (weights.attention_norm, weights.output_norm)
    known = all(isinstance(x, Linear) for x in linears) and all(isinstance(x, Norm) for x in norms)
    dropped = weights.attention_dropout or weights.hidden_dropout or weights.output_dropout
    if not known or dropped or not isinstance(weights.activation, str) or weights.scale <= 0:
        return None
    return [t for part in (*linears, *norms) for t in part if isinstance(t, Tensor)]


def _trained_tensors_of(weights: LayerWeights) -> tuple[Tensor | None, ...] | None:
    """What `fastbert.ops.layer_gradient.whole_layer` takes of a layer, if it is all there is in
    it."""
    linears = weights.attention_output, weights.intermediate, weights.output
    norms = weights.attention_norm, weights.output_norm
    known = (
        isinstance(weights.qkv, Stacked)
        and all(isinstance(x, Linear) for x in linears)
        and all(isinstance(x, Norm) for x in norms)
        and isinstance(weights.activation, str)
    )
    if not known or weights.pre_norm:
        return None
    width = weights.attention_output.weight.shape[:1]
    rows = (weights.attention_output.bias, weights.output.bias, *norms[0][:2], *norms[1][:2])
    if any(t is not None and t.shape != width for t in rows):
        return None  # the ops say so
    return (
        *weights.qkv.weights, *weights.qkv.biases, *linears[0], *norms[0][:2], *linears[1],
        *linears[2], *norms[1][:2],
    )  # fmt: skip


def _are_alike(each: list[LayerWeights]) -> bool:
    return len(set(map(_form, each))) == 1


def _form(part: object) -> object:
    """Everything of a layer that is tensors and numbers, but for the values in the tensors."""
    if isinstance(part, Tensor):
        return part.shape, part.stride(), part.dtype, part.device
    return tuple(map(_form, part)) if isinstance(part, tuple) else part
