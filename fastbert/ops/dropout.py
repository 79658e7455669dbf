"""Seeds of the dropout that is inside kernels.

A mask is a function of a seed and a position (`fastbert.kernels._dropout`); it is never stored. The
seed is drawn from torch's own generator of the device and stays there, so that
``torch.manual_seed``, activation checkpointing (which restores the generator's state) and replayed
CUDA graphs (which advance it) do what they do with torch's dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_dropout", "dropout_seed", "dropout_seeds"]


def dropout_seed(device: torch.device | str, generator: torch.Generator | None = None) -> Tensor:
    """A new seed, int64 ``[1]`` on ``device``; no synchronisation.

    Args:
        generator: where to draw it from; the device's default generator if None.
    """
    return torch.randint(
        -(2**62), 2**62, (1,), dtype=torch.int64, device=device, generator=generator
    )


def dropout_seeds(device: torch.device | str, count: int) -> tuple[Tensor, ...]:
    """Several seeds, each as of `dropout_seed`, by one launch."""
    # Two numbers each: kernels are compiled for pointers at multiples of 16 bytes.
    drawn = torch.randint(-(2**62), 2**62, (count, 2), dtype=torch.int64, device=device)
    return drawn[:, :1].unbind()


def check_dropout(op: str, p: float, seed: Tensor | None, device: torch.device) -> None:
    """Raise for a probability or a seed that no op takes.

    Raises:
        ValueError: ``p`` outside 0 to 1, or a seed that is not an int64 ``[1]`` on the device.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: expected dropout_p from 0 to 1, got {p}")
    if seed is not None and (
        seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != device
    ):
        raise ValueError(
            f"{op}: expected a seed from ops.dropout_seed, int64 (1,) on {device}, "
            f"got {seed.dtype} {tuple(seed.shape)} on {seed.device}"
        )
