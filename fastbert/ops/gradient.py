"""Who wants a gradient, and through what."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .backend import resolve

__all__ = [
    "first_order_only",
    "one_dtype",
    "refuse_seed",
    "rows_contiguous",
    "run_kernel",
    "trains_on_kernels",
    "wants_gradient",
]


def first_order_only(backward: Callable) -> Callable:
    """Decorator of a Function's backward that cannot itself be differentiated: says so.

    torch's ``once_differentiable`` gives constants, without a word, where the upstream gradient
    does not depend on anything, as behind a ``.sum()``.
    """

    @wraps(backward)
    def checked(ctx, *upstream):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "fastbert: the kernels give first-order gradients, and create_graph=True asks for "
                "more; compute this under fastbert.backend('torch') with "
                "model.set_attn_implementation('eager'), whose operations have second derivatives"
            )
        return backward(ctx, *upstream)

    return checked


def wants_gradient(*args: Any) -> bool:
    """Whether autograd has to record an op on these arguments."""
    return torch.is_grad_enabled() and any(
        isinstance(arg, Tensor) and arg.requires_grad for arg in args
    )


def one_dtype(*dtypes: torch.dtype | None) -> torch.dtype:
    """In which sums become gradients of parameters: theirs, or fp32 where they have several."""
    found = set(dtypes) - {None}
    return found.pop() if len(found) == 1 else torch.float32


def trains_on_kernels(x: Tensor, *others: Any) -> bool:
    """Whether an op on these has a gradient to prepare, on kernels, with no compiler looking on.

    A compiler does better with torch's operations than with ops that it cannot look into.
    """
    return (
        wants_gradient(x, *others)
        and not torch.compiler.is_compiling()
        and x.numel() > 0
        and resolve(x.device, x.dtype) == "triton"
    )


def rows_contiguous(t: Tensor) -> Tensor:
    """The tensor with a last stride of 1: gradients may come expanded."""
    return t if t.stride(-1) == 1 else t.contiguous()


def refuse_seed(op: str, seed: Tensor | None) -> None:
    """Raise for a seed where torch's dropout runs, which takes none.

    Raises:
        NotImplementedError: a seed was given.
    """
    if seed is not None:
        raise NotImplementedError(
            f"{op}: a seed is for the kernels' dropout, got one where torch runs; leave it out "
            "and use torch.manual_seed"
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
    @first_order_only
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

    For a kernel that has no backward yet: the op is run once more in torch and differentiated
    there, which is right for every input and as slow as torch (CONTRIBUTING.md begins with it).
    """
    if wants_gradient(*args):
        return _KernelWithTorchGradient.apply(kernel, in_torch, *args)
    return kernel(*args)
