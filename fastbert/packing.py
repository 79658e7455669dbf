"""Packed batches: the real tokens of a padded batch, one after the other, and where they came from.

A padded batch ``[B, S]`` with an attention mask becomes ``T`` packed rows. `PackedBatch` is the
geometry: how long each sequence is, which padded slot each row came from, and the tile maps that
attention kernels launch over. It is built once per forward pass and shared by every layer; building
it from a mask that lives on a GPU is the only host synchronisation of a forward pass, and from no
mask at all (or a mask on the CPU) there is none.

`PaddedBatch` is the same for a batch that has to stay padded: a per-query mask, or a traced program
whose shapes may not depend on data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby

import torch
from torch import Tensor

__all__ = [
    "Bounds", "LengthClass", "PackedBatch", "PaddedBatch", "capturing", "class_of", "pack",
    "unpack",
]  # fmt: skip

# Of classes of sequences, rising: how many queries and keys one of the class has at most. Longer
# sequences are the last class.
Bounds = tuple[tuple[int, int], ...]

# Numbers of a mask on a CPU up to which Python counts: four operations of torch whose code no cache
# holds take longer, 2 % of a frozen MiniLM's time for 32 tokens.
_FEW = 512


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, by whomever."""
    if torch.compiler.is_compiling() or device.type != "cuda":
        return False
    return torch.cuda.is_current_stream_capturing()


def _from_host(values: Sequence, device: torch.device | str) -> Tensor:
    """int32 numbers that the host knows, on a device.

    Raises:
        RuntimeError: a CUDA graph is being captured. It would read memory of the host again at each
            replay, when that is long gone.
    """
    if capturing(torch.device(device)):
        raise RuntimeError(
            "fastbert: expected no lengths of sequences inside a CUDA graph capture, got a batch "
            "with padding or packed sequences, whose layout is fixed on the host; capture full "
            "batches without a mask, or use fastbert.accelerate(model, cuda_graphs=True)"
        )
    return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)


def _is_real(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask != 0


def _counted(mask: Tensor) -> tuple[list[int], list[bool]]:
    """For each row of a mask ``[B, S]``: its real tokens, and whether the first column has one."""
    if mask.device.type == "cpu" and mask.numel() <= _FEW:
        rows = mask.tolist()
        return [sum(map(bool, row)) for row in rows], [bool(row[0]) for row in rows]
    real = _is_real(mask)
    # The one host synchronisation of a forward pass.
    lengths, first = torch.stack((real.sum(dim=1), real[:, 0])).tolist()
    return lengths, list(map(bool, first))


def class_of(bounds: Bounds, len_q: int, len_k: int) -> int:
    """Which class a sequence of these lengths belongs to."""
    for number, (most_q, most_k) in enumerate(bounds):
        if len_q <= most_q and len_k <= most_k:
            return number
    return len(bounds)


@dataclass(frozen=True, eq=False)
class LengthClass:
    """Sequences of a packed batch that attention treats alike, since their lengths are.

    Attributes:
        sequences: their numbers in the batch.
        lengths_q, lengths_k: how many queries and keys each of them has.
        max_seqlen_q, max_seqlen_k: the largest of these.
        device: where the batch is.
    """

    sequences: tuple[int, ...]
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    max_seqlen_q: int
    max_seqlen_k: int
    device: torch.device
    _tile_maps: dict[tuple, Tensor] = field(default_factory=dict, repr=False)

    def tile_map(self, block: int | None, of_keys: bool = False) -> Tensor:
        """int32 ``[num_tiles, 2]``: the (sequence, tile) pairs that cover every query, or every
        key, in tiles of ``block``; with None, one tile for each sequence.

        Longest sequences first, so that the last programs of a launch are short ones. Built on the
        host, where the lengths are known, once per tile size.
        """
        lengths = self.lengths_k if of_keys else self.lengths_q
        key = (block, of_keys and self.lengths_k is not self.lengths_q)
        found = self._tile_maps.get(key)
        if found is None:
            found = self._tile_maps[key] = self._tiles(
                [1 if block is None else -(-length // block) for length in lengths], lengths
            )
        return found

    def _tiles(self, counts: list[int], lengths: tuple[int, ...]) -> Tensor:
        everything = self.sequences == tuple(range(len(lengths)))
        if everything and len(set(lengths)) == 1 and capturing(self.device):
            # All sequences are alike: the device can tell by itself.
            each = counts[0]
            tiles = torch.arange(each * len(counts), dtype=torch.int32, device=self.device)
            return torch.stack((tiles // each, tiles % each), 1)
        order = sorted(range(len(counts)), key=lambda i: -lengths[i])
        tiles = [(self.sequences[i], tile) for i in order for tile in range(counts[i])]
        return _from_host(tiles, self.device).view(-1, 2)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Geometry of ``T`` packed rows that hold ``B`` sequences. Make one with a ``from_*`` method.

    Attributes:
        lengths: tokens of each sequence, on the host; 0 is allowed.
        cu_seqlens: int32 ``[B + 1]`` on the device, where each sequence starts and ends.
        indices: int64 ``[T]`` on the device, the slot of each row in the flattened padded batch, or
            None when every slot is real (rows and slots are then the same thing).
        padded_shape: ``(B, S)`` of the padded batch, or ``(1, T)`` for input that came packed.
        starts_real: whether every sequence that has tokens has one in column 0 (not so for padding
            on the left), which is the column that BERT's pooler reads.
        bias: floating ``[H, S, S]``, added to the scaled scores of every sequence, by places in it;
            S is the longest one's length. Or None.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    indices: Tensor | None
    padded_shape: tuple[int, int]
    starts_real: bool = True
    bias: Tensor | None = None
    _classes: list[tuple[Bounds, PackedBatch | None, tuple[LengthClass, ...]]] = field(
        default_factory=list, repr=False
    )

    @classmethod
    def dense(cls, batch_size: int, length: int, device: torch.device | str) -> PackedBatch:
        """``batch_size`` sequences of ``length`` tokens, no padding. No synchronisation."""
        count = batch_size * length
        cu_seqlens = torch.arange(0, count + 1, max(length, 1), dtype=torch.int32, device=device)
        cu_seqlens = cu_seqlens if length else cu_seqlens.repeat(batch_size + 1)
        return cls((length,) * batch_size, cu_seqlens, None, (batch_size, length))

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], device: torch.device | str = "cpu"
    ) -> PackedBatch:
        """A batch that is packed already: sequences of these lengths, one after the other."""
        if any(length < 0 for length in lengths):
            raise ValueError(f"from_lengths: expected lengths >= 0, got {list(lengths)}")
        starts = [0, *accumulate(lengths)]
        return cls(tuple(lengths), _from_host(starts, device), None, (1, starts[-1]))

    @classmethod
    def from_mask(cls, mask: Tensor, device: torch.device | str | None = None) -> PackedBatch:
        """The real tokens of a padded batch, wherever the mask has them: left, right or with holes.

        A row of the mask without any real token is a sequence of length 0: it has no packed rows,
        and unpacking gives it zeros.

        Args:
            mask: ``[B, S]`` bool, integer or floating; zero means padding, anything else a real
            token.
            device: where the packed rows will live; by default where the mask is. A mask on the CPU
                for rows on a GPU costs no synchronisation.

        Raises:
            ValueError: the mask does not have two dimensions.
        """
        if mask.dim() != 2:
            raise ValueError(
                f"from_mask: expected a mask [batch, length], got {tuple(mask.shape)}; a mask "
                "per query belongs to a PaddedBatch"
            )
        device = torch.device(device) if device is not None else mask.device
        batch_size, padded_length = mask.shape
        if mask.numel() == 0:
            return cls(
                (0,) * batch_size,
                mask.new_zeros(batch_size + 1, dtype=torch.int32).to(device),
                None,
                (batch_size, padded_length),
            )
        lengths, first = _counted(mask)
        if min(lengths) == padded_length:
            return cls.dense(batch_size, padded_length, device)
        real = _is_real(mask)
        starts = [0, *accumulate(lengths)]
        # nonzero() would ask the device for the number of rows again; it is known by now.
        indices = real.flatten().nonzero_static(size=starts[-1]).flatten().to(device)
        cu_seqlens = _from_host(starts, device)
        starts_real = all(f or not n for f, n in zip(first, lengths, strict=True))
        return cls(tuple(lengths), cu_seqlens, indices, (batch_size, padded_length), starts_real)

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths, default=0)

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch on another device (models that are spread over several call this)."""
        if torch.device(device) == self.device:
            return self
        indices = (
            None if self.indices is None else self.indices.to(device, non_blocking=non_blocking)
        )
        return PackedBatch(
            self.lengths,
            self.cu_seqlens.to(device, non_blocking=non_blocking),
            indices,
            self.padded_shape,
            self.starts_real,
            None if self.bias is None else self.bias.to(device, non_blocking=non_blocking),
        )

    def with_bias(self, bias: Tensor) -> PackedBatch:
        """The same sequences with a bias ``[H, S, S]``."""
        return replace(self, bias=bias)

    def pack(self, x: Tensor) -> Tensor:
        """``[B, S, ...]`` -> ``[T, ...]``; a view when there is no padding."""
        flat = x.reshape(-1, *x.shape[2:])
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def unpack(self, rows: Tensor, fill: float = 0.0) -> Tensor:
        """``[T, ...]`` -> ``[B, S, ...]`` with ``fill`` in the padding; a view without padding."""
        batch_size, padded_length = self.padded_shape
        if self.indices is None:
            return rows.view(batch_size, padded_length, *rows.shape[1:])
        flat = rows.new_full((batch_size * padded_length, *rows.shape[1:]), fill)
        flat.index_copy_(0, self.indices, rows)
        return flat.view(batch_size, padded_length, *rows.shape[1:])

    def first_rows(self, rows: Tensor) -> Tensor:
        """``[T, ...]`` -> ``[B, ...]``: each sequence's first row ([CLS]), zeros if empty."""
        if 0 not in self.lengths:
            return rows.index_select(0, self.cu_seqlens[:-1])
        starts = [0, *accumulate(self.lengths)][:-1]
        full = [i for i, length in enumerate(self.lengths) if length]
        first = rows.new_zeros(len(self.lengths), *rows.shape[1:])
        source = torch.tensor([starts[i] for i in full], dtype=torch.long, device=rows.device)
        target = torch.tensor(full, dtype=torch.long, device=rows.device)
        return first.index_copy_(0, target, rows.index_select(0, source))

    def columns(self, device: torch.device | None = None) -> Tensor:
        """int64 ``[T]``: the padded column of each row, which is BERT's default position id."""
        batch_size, padded_length = self.padded_shape
        if self.indices is None:
            columns = torch.arange(padded_length, device=device or self.device)
            return columns if batch_size == 1 else columns.repeat(batch_size)
        return self.indices % padded_length

    def places(self) -> tuple[Tensor, Tensor]:
        """int64 ``[T]`` each: the sequence of every row, and its place there."""
        lengths = self.cu_seqlens.diff().long()
        count = self.num_tokens
        sequences = torch.arange(self.num_sequences, device=self.device)
        sequences = sequences.repeat_interleave(lengths, output_size=count)
        starts = self.cu_seqlens[:-1].long().repeat_interleave(lengths, output_size=count)
        return sequences, torch.arange(count, device=self.device) - starts

    def runs(self) -> list[tuple[int, int]]:
        """Neighbours of equal length as ``(how_many, length)``, empty ones left out."""
        groups = groupby(self.lengths)
        return [(sum(1 for _ in group), length) for length, group in groups if length]

    def classes(self, bounds: Bounds, keys: PackedBatch | None = None) -> tuple[LengthClass, ...]:
        """The sequences by their lengths, longest ones first; empty ones are in no class.

        What attention does with a sequence follows from its class and so from its own length, never
        from its neighbours, whatever batch it is in.

        Args:
            bounds: of the classes; kept by these.
            keys: the sequences of the keys, where they are others.
        """
        keys = None if keys is self else keys
        for kept, of, classes in self._classes:
            if of is keys and kept == bounds:
                return classes
        classes = self._by_length(bounds, keys)
        self._classes.append((bounds, keys, classes))
        return classes

    def _by_length(self, bounds: Bounds, keys: PackedBatch | None) -> tuple[LengthClass, ...]:
        lengths_k = self.lengths if keys is None else keys.lengths
        pairs = list(zip(self.lengths, lengths_k, strict=True))
        numbers = {pair: class_of(bounds, *pair) for pair in set(pairs) if any(pair)}
        made = {c.sequences: c for _, of, classes in self._classes if of is keys for c in classes}
        found = []
        for number in sorted(set(numbers.values()), reverse=True):
            sequences = tuple(i for i, pair in enumerate(pairs) if numbers.get(pair) == number)
            if sequences not in made:
                of_q = tuple(self.lengths[i] for i in sequences)
                of_k = of_q if keys is None else tuple(lengths_k[i] for i in sequences)
                made[sequences] = LengthClass(
                    sequences, of_q, of_k, max(of_q), max(of_k), self.device
                )
            found.append(made[sequences])
        return tuple(found)


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """Geometry of a batch that stays padded: ``B * S`` rows, masked inside attention.

    Attributes:
        padded_shape: ``(B, S)``.
        key_mask: bool ``[B, S]``, True for real tokens, or None.
        bias: floating ``[B | 1, H | 1, S | 1, S]``, added to the scaled scores, or None.
        shared: what the first layer makes of mask and bias for all of them, in
            `fastbert.ops.attention`.
    """

    padded_shape: tuple[int, int]
    key_mask: Tensor | None = None
    bias: Tensor | None = None
    shared: dict = field(default_factory=dict, init=False, repr=False)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PaddedBatch:
        """The same batch on another device."""
        key_mask, bias = (
            None if t is None else t.to(device, non_blocking=non_blocking)
            for t in (self.key_mask, self.bias)
        )
        return PaddedBatch(self.padded_shape, key_mask, bias)

    def with_bias(self, bias: Tensor) -> PaddedBatch:
        """The same batch with a bias ``[H, S, S]``, beside the one that it has."""
        return replace(self, bias=bias[None] if self.bias is None else self.bias + bias)

    def pack(self, x: Tensor) -> Tensor:
        """``[B, S, ...]`` -> ``[B * S, ...]``."""
        return x.reshape(-1, *x.shape[2:])

    def view(self, rows: Tensor) -> Tensor:
        """``[B * S, ...]`` -> ``[B, S, ...]`` with whatever the rows hold in the padding."""
        return rows.unflatten(0, self.padded_shape)

    def unpack(self, rows: Tensor, fill: float = 0.0) -> Tensor:
        """``[B * S, ...]`` -> ``[B, S, ...]`` with ``fill`` where the key mask has padding."""
        padded = self.view(rows)
        if self.key_mask is None:
            return padded
        padding = ~self.key_mask.view(*self.key_mask.shape, *(1,) * (padded.dim() - 2))
        return padded.masked_fill(padding, fill)

    def first_rows(self, rows: Tensor) -> Tensor:
        """``[B * S, ...]`` -> ``[B, ...]``: column 0 of each sequence."""
        return self.view(rows)[:, 0]

    def columns(self, device: torch.device) -> Tensor:
        """int64 ``[B * S]``: the padded column of each row."""
        return torch.arange(self.padded_shape[1], device=device).repeat(self.padded_shape[0])


def pack(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, PackedBatch]:
    """Drop the padding of a batch.

    Args:
        x: ``[B, S, ...]``, ids or features.
        mask: ``[B, S]`` bool, integer or floating, zero for padding; None for no padding.

    Returns:
        The packed rows ``[T, ...]`` in order (a view of ``x`` when there is no padding) and the
        `PackedBatch` that `unpack` needs.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if x.dim() < 2:
        raise ValueError(f"pack: expected [batch, length, ...], got {tuple(x.shape)}")
    if mask is None:
        batch = PackedBatch.dense(x.shape[0], x.shape[1], x.device)
    elif mask.shape != x.shape[:2]:
        raise ValueError(
            f"pack: expected a mask {tuple(x.shape[:2])} for {x.shape=}, got {tuple(mask.shape)}"
        )
    else:
        batch = PackedBatch.from_mask(mask, x.device)
    return batch.pack(x), batch


def unpack(rows: Tensor, batch: PackedBatch, fill: float = 0.0) -> Tensor:
    """Put packed rows ``[T, ...]`` back into ``[B, S, ...]``, with ``fill`` in the padding.

    Raises:
        ValueError: ``rows`` does not have the batch's number of tokens.
    """
    if rows.shape[0] != batch.num_tokens:
        raise ValueError(
            f"unpack: expected {batch.num_tokens} rows for {batch.num_sequences} sequences, "
            f"got {rows.shape=}"
        )
    return batch.unpack(rows, fill)
