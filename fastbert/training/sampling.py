"""Batches of so many real tokens.

What a step costs is its tokens, not its sequences: batches that are counted in sequences are short
on one step and do not fit in memory on the next. A batch here is at most N tokens, whatever its
sequences are, and which examples it holds follows from numbers alone: the lengths, a seed, an
epoch. Neither the number of processes nor a restart changes the batches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

__all__ = ["TokenBudgetSampler"]

_WINDOW = 64  # batches whose examples are put in order of length where padding costs tokens


class TokenBudgetSampler(Sampler[list[int]]):
    """Batches of examples that hold at most ``tokens`` tokens each; for ``batch_sampler=`` of a
    ``torch.utils.data.DataLoader``.

    Every example is in one batch of an epoch. Of several processes each gets as many batches as
    the others, and together they get what one would: batch ``i`` goes to process
    ``i % world_size``, so that a step of ``world_size`` batches is the same however they are shared
    out. Batches are split where their number is not a multiple.

    Args:
        lengths: ``[N]``, tokens of each example, each at least 1.
        tokens: of a batch at most, padding included where ``padded``.
        seed: of the order.
        epoch: the first one; `set_epoch` says when the next begins.
        rank, world_size: which process this is, of how many; by default what torch.distributed
            says, if it runs.
        shuffle: a new order in every epoch; otherwise examples come as they are.
        padded: a batch is padded to its longest example, and those of similar length are put
            together.

    All the state there is are two numbers, the epoch and how many batches of it this process was
    given; who resumes says them to `resume`. Count the batches that were trained on: a
    DataLoader's workers fetch ahead.

    Raises:
        ValueError: no example, a length below 1 or above ``tokens``, or fewer examples than
            processes.

    Asked for in transformers' issues 10512 and 21325; fairseq and tensor2tensor have long counted
    batches in tokens.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        tokens: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        shuffle: bool = True,
        padded: bool = False,
    ):
        self.lengths = np.asarray(lengths)
        if self.lengths.ndim != 1 or self.lengths.size == 0:
            raise ValueError(
                "TokenBudgetSampler: expected the lengths of one example or more, got "
                f"{'none' if self.lengths.size == 0 else f'shape {self.lengths.shape}'}"
            )
        for bad in np.flatnonzero((self.lengths < 1) | (self.lengths > tokens))[:1]:
            raise ValueError(
                f"TokenBudgetSampler: expected examples of 1 to {tokens} tokens, got "
                f"{self.lengths[bad]} in example {bad}; truncate it, leave it out, or allow a "
                "batch more tokens"
            )
        found = _from_torch() if rank is None or world_size is None else (0, 1)
        self.rank = found[0] if rank is None else rank
        self.world_size = found[1] if world_size is None else world_size
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"TokenBudgetSampler: expected a rank from 0 to {self.world_size - 1}, "
                f"got {self.rank}"
            )
        self.tokens, self.seed, self.shuffle, self.padded = tokens, seed, shuffle, padded
        self.epoch, self._skipped = epoch, 0
        self._made: tuple[int, list[np.ndarray]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; nothing changes if that is the one at hand."""
        if epoch != self.epoch:
            self.resume(epoch, 0)

    def resume(self, epoch: int, batch: int) -> None:
        """Go on in an epoch behind the first ``batch`` batches of this process."""
        self.epoch, self._skipped = epoch, batch

    def __len__(self) -> int:
        """Batches that the next iteration gives this process."""
        return len(self._batches()) // self.world_size - self._skipped

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._batches()[self.rank :: self.world_size]
        skipped, self._skipped = self._skipped, 0  # once: after that the epoch is whole again
        yield from (batch.tolist() for batch in batches[skipped:])

    def _batches(self) -> list[np.ndarray]:
        """Of all processes, in their order."""
        if self._made is None or self._made[0] != self.epoch:
            self._made = self.epoch, self._make()
        return self._made[1]

    def _make(self) -> list[np.ndarray]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = np.arange(self.lengths.size)
        if self.shuffle:
            random.shuffle(order)
        if self.padded:
            order = self._by_length(order)
        batches = self._cut(order)
        _make_even(batches, self.world_size)
        if self.padded and self.shuffle:  # or each window would go from short to long
            random.shuffle(batches)
        return batches

    def _by_length(self, order: np.ndarray) -> np.ndarray:
        """Examples of similar length next to each other, but only among those of a window: the
        whole epoch in order would be the same batches every time."""
        ends = np.cumsum(self.lengths[order])
        cuts = np.flatnonzero(np.diff(ends // (self.tokens * _WINDOW))) + 1
        parts = np.split(order, cuts)
        return np.concatenate(
            [part[np.argsort(self.lengths[part], kind="stable")] for part in parts]
        )

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        lengths = self.lengths[order]
        ends = np.cumsum(lengths)
        batches, start = [], 0
        while start < len(order):
            if self.padded:
                end = self._padded_end(lengths, start)
            else:
                before = ends[start] - lengths[start]
                end = int(np.searchsorted(ends, before + self.tokens, side="right"))
            batches.append(order[start:end])
            start = end
        return batches

    def _padded_end(self, lengths: np.ndarray, start: int) -> int:
        """Where a batch has to end that is padded to its longest example."""
        longest = np.maximum.accumulate(lengths[start : start + self.tokens])
        sizes = longest * np.arange(1, len(longest) + 1)
        return start + bisect_right(sizes, self.tokens)


def _from_torch() -> tuple[int, int]:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _make_even(batches: list[np.ndarray], world_size: int) -> None:
    """Split the batches of most examples until every process gets as many as the others."""
    while len(batches) % world_size:
        largest = max(range(len(batches)), key=lambda i: len(batches[i]))
        whole = batches[largest]
        if len(whole) == 1:
            raise ValueError(
                f"TokenBudgetSampler: expected batches for {world_size} processes to have as many "
                f"each, got {len(batches)} of one example; allow a batch more tokens, or use "
                "fewer processes"
            )
        batches[largest : largest + 1] = np.array_split(whole, 2)
