"""Gradients of ops whose kernels have a forward only: recomputed through the torch implementation.

The forward pass runs the kernel, the backward pass runs the op once more in torch and
differentiates that. It is right for every input and as slow as torch; a backward kernel replaces
it op by op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["run_kernel", "wants_gradient"]


def wants_gradient(*args: Any) -> bool:
    """Whether autograd has to record an op on these arguments."""
    return torch.is_grad_enabled() and any(
        isinstance(arg, Tensor) and arg.requires_grad for arg in args
    )


class _KernelWithTorchGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel: Callable, in_torch: Callable, *args: Any) -> Tensor:
        ctx.in_torch = in_torch
        ctx.rest = [None if isinstance(arg, Tensor) else arg for arg in args]
        ctx.is_tensor = [isinstance(arg, Tensor) for arg in args]
        ctx.save_for_backward(*(arg for arg in args if isinstance(arg, Tensor)))
        return kernel(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        saved = iter(ctx.saved_tensors)
        args = [
            next(saved) if is_tensor else other
            for is_tensor, other in zip(ctx.is_tensor, ctx.rest, strict=True)
        ]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        with torch.enable_grad():
            for i in wanted:
                args[i] = args[i].detach().requires_grad_()
            out = ctx.in_torch(*args)
            grads = torch.autograd.grad(out, [args[i] for i in wanted], grad, allow_unused=True)
        result: list[Tensor | None] = [None] * len(args)
        for i, g in zip(wanted, grads, strict=True):
            result[i] = g
        return None, None, *result


def run_kernel(kernel: Callable, in_torch: Callable, *args: Any) -> Tensor:
    """``kernel(*args)``, differentiable as ``in_torch(*args)`` where a gradient is wanted.

    Differentiating twice raises torch's error for functions that are differentiable once.
    """
    if wants_gradient(*args):
        return _KernelWithTorchGradient.apply(kernel, in_torch, *args)
    return kernel(*args)
