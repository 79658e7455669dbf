"""Reading a module tree that belongs to someone else: what may be fused, what must be called.

A layer's forward works on plain tensors, but the modules stay in charge. A plain ``nn.Linear`` is
read as its tensors; what else may stand in its place (`fastbert.families.known`: a LoRA layer, a
quantised or offloaded linear) is called as a module, on packed rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from transformers import activations

from ..ops.backend import resolve
from ..weights import Linear, Norm, Projection, Stacked
from . import known

__all__ = [
    "activation_name",
    "dropout_p",
    "is_plain_embedding",
    "norm",
    "projection",
    "stack",
]

_ACTIVATIONS = {
    activations.GELUActivation: "gelu",
    activations.NewGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
    activations.SiLUActivation: "silu",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
}


def _is_plain(t: Tensor | None) -> bool:
    """Whether this is a dense tensor that kernels may read: not sparse, and no subclass with rules
    of its own (a quantised or distributed one), which torch's functions know what to do with."""
    return t is None or (
        (type(t) is nn.Parameter or type(t) is Tensor or is_fake(t)) and t.layout is torch.strided
    )


def projection(module: nn.Module) -> Projection:
    """A plain ``nn.Linear`` of plain tensors as those, anything else as the function it is."""
    if known.plain(module, nn.Linear):
        weight, bias = module.weight, module.bias
        if _is_plain(weight) and _is_plain(bias):
            return Linear(weight, bias)
    return module


def norm(module: nn.Module) -> Norm | Callable[[Tensor], Tensor]:
    """A plain ``nn.LayerNorm`` over one dimension as its tensors, else the function it is."""
    if known.plain(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        weight, bias = module.weight, module.bias
        if _is_plain(weight) and _is_plain(bias):
            return Norm(weight, bias, module.eps)
    return module


def is_plain_embedding(module: nn.Module) -> bool:
    """Whether a lookup in this table is a row of its weight, and the gradient a plain sum."""
    return (
        known.plain(module, nn.Embedding)
        and _is_plain(module.weight)
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


def stack(parts: tuple[Projection, ...]) -> Stacked | tuple[Projection, ...]:
    """Several linear layers over the same rows as one product, where that is a gain.

    In training on the kernels one product of three times the width beats three, forward and
    backward, and pays for joining the weights in every call. In inference it would not, and weights
    stay where they are, whoever else may hold them: three products.
    """
    if torch.compiler.is_compiling():  # a compiler fuses by itself
        return parts
    if not all(isinstance(p, Linear) and p.bias is not None for p in parts):
        return parts
    weights, biases = zip(*parts, strict=True)
    if resolve(weights[0].device) == "torch" and weights[0].device.type == "cpu":
        return parts  # three cost as much as one, for few tokens up to a sixth less
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*weights, *biases)):
        return Stacked(weights, biases)
    return parts
