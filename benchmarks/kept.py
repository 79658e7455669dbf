"""Counts what autograd keeps between forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["Kept", "kept_for_backward"]


class Kept:
    """Bytes, by now."""

    bytes = 0


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[Kept]:
    """Counts what the forward passes inside keep, each storage once and parameters not."""
    found, held = Kept(), {}
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in held:
            held[storage._cdata] = storage  # so that no address is used twice
            found.bytes += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found
