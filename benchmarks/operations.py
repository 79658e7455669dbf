"""What an operation of the benchmarks is, and what those who offer it are made of."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fastbert.kernels import _cost
from torch import Tensor

from .workload import Unavailable

__all__ = [
    "COMPILED", "EAGER", "LIGER", "Function", "Inputs", "Op", "compiled", "eager", "needs",
    "normals",
]  # fmt: skip

EAGER, COMPILED, LIGER = "torch eager", "torch.compile", "Liger"
Inputs = dict[str, Any]
Function = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Op:
    """An operation and everybody who offers it.

    Attributes:
        make: (params, dtype, device, seed) -> inputs; those named in ``leaves`` have gradients.
        reference: the specification; also gives the check its oracle, from fp64 inputs.
        others: provider -> builder of its function, given the device.
        cost: (params, itemsize) -> least work of forward, and of backward.
        rows: (inputs, output) -> what is compared, where a provider's layout differs.
        oracle: the reference in another order, where fp64 would take too much memory at once.
    """

    make: Callable[[dict, torch.dtype, str, int], Inputs]
    reference: Function
    ours: Function
    others: dict[str, Callable[[str], Function]]
    leaves: tuple[str, ...]
    cost: Callable[[dict, int], tuple[_cost.Cost, _cost.Cost]]
    rows: Callable[[Inputs, Tensor], Tensor] = lambda x, out: out
    oracle: Function | None = None


def compiled(function: Function) -> Callable[[str], Function]:
    def build(device: str) -> Function:
        torch._dynamo.reset()
        mode = "max-autotune-no-cudagraphs" if device == "cuda" else None
        return torch.compile(function, mode=mode, dynamic=False)

    return build


def needs(package: str, device: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package.replace('_', '-')} is not installed")
    if device != "cuda":
        raise Unavailable(f"{package.replace('_', '-')} needs a GPU")


def normals(device: str, seed: int) -> Callable[..., Tensor]:
    """``sizes -> `` standard normal values in fp32, drawn where they are needed: on a CPU the
    largest workloads would take seconds each."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *sizes: torch.randn(*sizes, generator=generator, device=device)


def eager(function: Function) -> Callable[[str], Function]:
    return lambda device: function
