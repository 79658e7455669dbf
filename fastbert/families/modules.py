"""Reading a module tree that belongs to someone else: what may be fused, what must be called.

A layer's forward works on plain tensors, but the modules stay in charge. A plain ``nn.Linear`` is
read as its tensors; what else may stand in its place (`fastbert.families.known`: a LoRA layer, a
quantised or offloaded linear) is called as a module, on packed rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import activations

from ..encoder import Linear, Norm, Projection, Stacked
from ..ops.backend import resolve
from . import known

__all__ = [
    "activation_name",
    "dropout_p",
    "fuse",
    "is_plain_embedding",
    "norm",
    "projection",
]

_ACTIVATIONS = {
    activations.GELUActivation: "gelu",
    activations.NewGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
    activations.SiLUActivation: "silu",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
}


def projection(module: nn.Module) -> Projection:
    """A plain ``nn.Linear`` as its tensors, anything else as the function it is."""
    if known.plain(module, nn.Linear):
        return Linear(module.weight, module.bias)
    return module


def norm(module: nn.Module) -> Norm | Callable[[Tensor], Tensor]:
    """A plain ``nn.LayerNorm`` over one dimension as its tensors, else the function it is."""
    if known.plain(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return Norm(module.weight, module.bias, module.eps)
    return module


def is_plain_embedding(module: nn.Module) -> bool:
    """Whether a lookup in this table is a row of its weight, and the gradient a plain sum."""
    return (
        known.plain(module, nn.Embedding)
        and module.max_norm is None
        and not module.sparse
        and not module.scale_grad_by_freq
    )


def dropout_p(module: nn.Module) -> float | None:
    """The probability a dropout module applies now, or None if the module is something else."""
    if isinstance(module, nn.Identity):
        return 0.0
    if type(module) is not nn.Dropout:
        return None
    return module.p if module.training else 0.0


def activation_name(module: Callable[[Tensor], Tensor]) -> str | Callable[[Tensor], Tensor]:
    """The op's name for an activation module that has one, else the module."""
    return _ACTIVATIONS.get(type(module), module)


def fuse(parts: tuple[Projection, ...]) -> Linear | Stacked | tuple[Projection, ...]:
    """Several linear layers over the same rows as one, where that is a gain.

    On a GPU one product of three times the width beats three. In inference the weights are moved
    next to each other in memory once, each parameter then being a view of its third: nothing is
    cached that a later change of a weight, by whatever route, could leave behind. With gradients
    they are concatenated in every call. On a CPU three products cost as much as one, for few tokens
    up to a sixth more, and nothing is fused.
    """
    if torch.compiler.is_compiling():  # a compiler may not move memory, and fuses by itself
        return parts
    if not all(isinstance(p, Linear) and p.bias is not None for p in parts):
        return parts
    weights, biases = zip(*parts, strict=True)
    if resolve(weights[0].device) == "torch" and weights[0].device.type == "cpu":
        return parts
    if any(type(t) is not nn.Parameter for t in weights):
        return parts
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*weights, *biases)):
        return Stacked(weights, biases)
    weight, bias = adjacent(weights), adjacent(biases)
    if weight is None or bias is None:
        if not (can_move(weights) and can_move(biases)):
            return parts
        weight, bias = make_adjacent(weights), make_adjacent(biases)
    return Linear(weight, bias)


def adjacent(tensors: tuple[Tensor, ...]) -> Tensor | None:
    """The tensors as one, stacked along dimension 0, if memory already holds them so; else None."""
    first = tensors[0]
    storage = first.untyped_storage().data_ptr()
    offset = first.storage_offset()
    for t in tensors:
        if (
            t.untyped_storage().data_ptr() != storage
            or t.storage_offset() != offset
            or not t.is_contiguous()
            or t.shape[1:] != first.shape[1:]
            or t.dtype != first.dtype
        ):
            return None
        offset += t.numel()
    rows = sum(t.shape[0] for t in tensors)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def can_move(tensors: tuple[Tensor, ...]) -> bool:
    """Whether these parameters own their memory alone, so that nobody else would miss the move."""
    first = tensors[0]
    return len({id(t) for t in tensors}) == len(tensors) and all(
        t.is_contiguous()
        and t.dtype == first.dtype
        and t.device == first.device
        and not t.is_inference()
        and not t.is_shared()
        and t.storage_offset() == 0
        and t.untyped_storage().nbytes() == t.numel() * t.element_size()
        for t in tensors
    )


def make_adjacent(tensors: tuple[Tensor, ...]) -> Tensor:
    """Give parameters one memory block, in order; they keep their values and identity."""
    # Not in inference mode, whoever calls: its tensors could never be trained again.
    with torch.inference_mode(False), torch.no_grad():
        block = torch.cat([t.detach() for t in tensors])
        for t, view in zip(tensors, block.split([t.shape[0] for t in tensors]), strict=True):
            t.data = view
    return block
