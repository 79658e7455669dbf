"""The batches of a whole run, for all its processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from typing import Any, Protocol

import torch

from .sampling import TokenBudgetSampler

__all__ = ["BatchStream", "TokenBatches"]


class EpochBatches(Protocol):
    """The batches of an epoch."""

    def resume(self, epoch: int, batches: int) -> None:
        """Leave out the first ones."""

    def __len__(self) -> int:
        """How many there are, those that are left out too."""

    def __iter__(self) -> Iterator[list[int]]: ...


class BatchStream(ABC, torch.utils.data.Sampler[list[Hashable]]):
    """The batches of a whole run, epoch after epoch.

    The stream of batches is one for all processes, which take turns: so many steps of so many
    batches are the same on one process and on several.

    Args:
        count: batches of this process.
        seed: of the order.
        rank, world_size: which process this is, of how many.
        shuffle: a new order in every epoch.

    Attributes:
        done: batches that this process was given before; of these `__iter__` gives empty ones,
            for Trainer to skip.
        starts: where in the stream each epoch that is known by now begins.
    """

    def __init__(
        self,
        count: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ):
        self.seed, self.shuffle = seed, shuffle
        self._count, self._rank, self._world_size = count, rank, world_size
        self.done = 0
        self.starts = [0]

    @abstractmethod
    def examples(self, epoch: int) -> Any:
        """Those of an epoch."""

    @abstractmethod
    def sampler(self, examples: Any, epoch: int) -> EpochBatches:
        """What makes batches of them."""

    def keys(self, examples: Any, epoch: int, batch: list[int], over: float) -> list[Hashable]:
        """What the dataset knows the examples of a batch by.

        Args:
            examples: of the epoch.
            batch: which of them.
            over: share of the run that is over.
        """
        return batch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[Hashable]]:
        yield from ([] for _ in range(self.done))
        left = self._count - self.done
        for place, examples, epoch, batch in self._stream(self.done * self._world_size):
            if left == 0:
                return
            if place % self._world_size == self._rank:
                left -= 1
                over = place / (self._count * self._world_size)
                yield self.keys(examples, epoch, batch, over)

    def _stream(self, start: int) -> Iterator[tuple[int, Any, int, list[int]]]:
        """The batches of all processes from one on: place, examples of the epoch, epoch, and which
        of them."""
        epoch = max(e for e, first in enumerate(self.starts) if first <= start)
        while True:
            examples = self.examples(epoch)
            batches = self.sampler(examples, epoch)
            first = self.starts[epoch]
            if epoch + 1 == len(self.starts):
                self.starts.append(first + len(batches))
            skipped = min(max(start - first, 0), len(batches))
            batches.resume(epoch, skipped)
            for place, batch in enumerate(batches, first + skipped):
                yield place, examples, epoch, batch
            epoch += 1


class TokenBatches(BatchStream):
    """Batches of at most ``tokens`` tokens, of examples with ``lengths``, ``[N]``.

    Args:
        tokens: of a batch at most.
        count, options: as `BatchStream`.
    """

    def __init__(self, tokens: int, count: int, **options: int):
        super().__init__(count, **options)
        self.tokens = tokens

    def sampler(self, examples: Any, epoch: int) -> TokenBudgetSampler:
        return TokenBudgetSampler(
            examples.lengths, self.tokens, seed=self.seed, epoch=epoch, rank=0, world_size=1,
            shuffle=self.shuffle,
        )  # fmt: skip
