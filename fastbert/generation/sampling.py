"""How a word is drawn from a distribution."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..tasks.errors import InputError

__all__ = ["Sampling"]


class Sampling(NamedTuple):
    """Settings of a draw.

    Attributes:
        temperature: what logarithms are divided by; 0 for the likeliest word always.
        top_k: so many words at most; 0 for all.
        top_p: the likeliest words that have so much of the probability together, one at least
            (Holtzman et al., 1904.09751).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> Sampling:
        """This one.

        Raises:
            InputError: a setting that cannot be.
        """
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"expected a temperature of 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"expected a top-k of 0, for all words, or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"expected a top-p above 0 and up to 1, got {self.top_p}")
        return self

    def distribution(self, log_probs: Tensor) -> Tensor:
        """What is drawn from: probabilities ``[..., V]``, of ``log_probs`` of that shape."""
        if self.temperature == 0:
            best = log_probs.argmax(-1, keepdim=True)
            return torch.zeros_like(log_probs).scatter_(-1, best, 1.0)
        scores = log_probs / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            kept = scores.topk(self.top_k, -1)
            scores = torch.full_like(scores, float("-inf")).scatter_(-1, kept.indices, kept.values)
        shares = scores.softmax(-1)
        if self.top_p < 1:
            ordered, order = shares.sort(dim=-1, descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered  # of likelier words
            shares = shares.scatter(-1, order, ordered.masked_fill(before >= self.top_p, 0.0))
        return shares / shares.sum(-1, keepdim=True)

    def draw(self, log_probs: Tensor, random: np.random.Generator) -> list[int]:
        """A word for each row of ``[N, V]``."""
        shares = self.distribution(log_probs).double().cpu()
        if self.temperature == 0:
            return shares.argmax(-1).tolist()
        edges = shares.cumsum(-1).numpy()
        found = []
        for row, at in zip(edges, random.random(len(edges)), strict=True):
            found.append(int(np.searchsorted(row, at * row[-1], side="right")))
        return found
