"""Sizes by name: models, length distributions, and the shapes of kernel benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["LENGTHS", "MODELS", "ModelShape", "draw_lengths", "fill_of"]


@dataclass(frozen=True)
class ModelShape:
    """A BERT by its sizes; weights are random, so that no download is needed."""

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vocab_size: int = 30522

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


MODELS = {
    "tiny": ModelShape(1, 32, 2, 64, 211),  # for the tests of the suite itself
    "minilm": ModelShape(6, 384, 12, 1536),
    "base": ModelShape(12, 768, 12, 3072),
    "large": ModelShape(24, 1024, 16, 4096),
}

# name -> lengths of B sequences padded to S, given standard normal z and uniform u, both [B].
LENGTHS = {
    "fixed": lambda z, u, s: torch.full_like(u, s),
    # every length is as likely: half of the batch is padding
    "uniform": lambda z, u, s: 1 + (s - 1) * u,
    # question with paragraph: most around 0.42 S with a tail to the right
    "squad": lambda z, u, s: 0.42 * s * torch.exp(0.35 * z),
    # queries and sentences: log-normal, median S / 6
    "short": lambda z, u, s: s / 6 * torch.exp(0.6 * z),
}


def draw_lengths(name: str, batch: int, length: int, seed: int = 0) -> list[int]:
    """Lengths of ``batch`` sequences from 1 to ``length``; the first is ``length`` itself.

    Raises:
        ValueError: an unknown distribution.
    """
    if name not in LENGTHS:
        raise ValueError(f"lengths: expected one of {', '.join(LENGTHS)}, got {name!r}")
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, generator=generator)
    u = torch.rand(batch, generator=generator)
    drawn = LENGTHS[name](z, u, length).round().clamp(1, length).long().tolist()
    drawn[0] = length
    return drawn


def fill_of(lengths: list[int]) -> float:
    """Share of real tokens when all are padded to the longest."""
    return sum(lengths) / (len(lengths) * max(lengths))
