"""CUDA graphs for inference: all layers of an encoder as one launch, whatever the batch.

A batch of one sentence keeps a GPU busy for less time than it takes to launch its kernels one by
one. Replaying a captured graph launches them all at once, but a graph has fixed shapes and reads
fixed memory. So batches go through buckets: rows, sequences and tiles are counted up to the next
size of a ladder, the rows are copied into the bucket's memory together with where their sequences
start, and what is past the end belongs to no sequence: rows are independent of each other in all
that a layer does but attention, and attention reads the rows of sequences only. A graph per bucket
serves every batch that fits it, so that ragged batches capture nothing anew.

Weights are read where they are: changes in place are seen. Whoever replaces a tensor makes all
graphs be captured again at the next call.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .encoder import encode_layers
from .ops.inference import only_kernels
from .packing import Bounds, LengthClass, PackedBatch, PaddedBatch, capturing, class_of
from .weights import Layers

__all__ = ["Bucket", "CudaGraphs", "bucket_of"]

_log = logging.getLogger("fastbert")
# Lengths between which attention chooses another tile; from 129 tokens on it walks over keys,
# however many.
_LENGTHS = (32, 64, 128, 256)
_WARM_UPS = 2  # before a capture: kernels are compiled and libraries make their workspaces


class Bucket(NamedTuple):
    """How much one graph takes: rows, sequences, tokens of the longest one (32, 64, 128, or 256:
    any), and whether there are shorter ones than of that step."""

    tokens: int
    sequences: int
    longest: int
    mixed: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """The steps of `longest` that sequences of a batch in it may belong to."""
        return _LENGTHS[: _LENGTHS.index(self.longest) + 1] if self.mixed else (self.longest,)


def bucket_of(batch: PackedBatch) -> Bucket:
    """The smallest bucket for a batch.

    Up to 64 rows in steps of 16, to 2048 by halves of a power of two, beyond in steps of 512: a
    third of the rows at most is empty where weights decide the time anyway, a fifth where rows do.
    """
    n = batch.num_tokens
    if n <= 64:
        tokens = max(16, -(-n // 16) * 16)
    elif n <= 2048:
        power = 1 << (n - 1).bit_length()
        tokens = power * 3 // 4 if n <= power * 3 // 4 else power
    else:
        tokens = -(-n // 512) * 512
    sequences = 1 << (batch.num_sequences - 1).bit_length()
    steps = {_LENGTHS[min(bisect_left(_LENGTHS, n), 3)] for n in set(batch.lengths) if n}
    return Bucket(tokens, sequences, max(steps), len(steps) > 1)


class _StaticClass(LengthClass):
    """Memory for the tiles of any sequences of a class in a bucket; those that are not used belong
    to its last sequence, which is empty."""

    def __init__(self, bucket: Bucket, longest: int, device: torch.device):
        super().__init__((), (), (), longest, longest, device)
        object.__setattr__(self, "bucket", bucket)

    def tile_map(self, block: int | None, of_keys: bool = False) -> Tensor:
        found = self._tile_maps.get((block, False))
        if found is None:
            tiles = -(-self.bucket.tokens // block) + self.bucket.sequences
            found = torch.full(
                (tiles, 2), self.bucket.sequences, dtype=torch.int32, device=self.device
            )
            self._tile_maps[block, False] = found
        return found

    def hold(self, sequences: LengthClass | None) -> None:
        """Put the tiles of a batch where the graph reads them."""
        for (block, _), tile_map in self._tile_maps.items():
            count = 0
            if sequences is not None:
                used = sequences.tile_map(block)
                count = used.shape[0]
                tile_map[:count].copy_(used)
            tile_map[count:, 0].fill_(self.bucket.sequences)


class _StaticBatch(PackedBatch):
    """A bucket as a batch: memory for the geometry of any batch that fits.

    Between the sequences and the end of ``cu_seqlens`` are empty ones.
    """

    def __init__(self, bucket: Bucket, device: torch.device):
        rows = bucket.sequences + 2
        super().__init__((), torch.zeros(rows, dtype=torch.int32, device=device), None, (1, 0))
        object.__setattr__(self, "bucket", bucket)

    @property
    def num_tokens(self) -> int:
        return self.bucket.tokens

    @property
    def max_seqlen(self) -> int:
        return self.bucket.longest

    def _by_length(self, bounds: Bounds, keys: PackedBatch | None) -> tuple[LengthClass, ...]:
        longest = {class_of(bounds, n, n): n for n in self.bucket.lengths}
        return tuple(
            _StaticClass(self.bucket, n, self.device)
            for n in sorted(longest.values(), reverse=True)
        )

    def hold(self, batch: PackedBatch) -> None:
        """Put the geometry of a batch where the graph reads it."""
        empty = self.bucket.sequences
        ends = list(accumulate(batch.lengths))
        ends += [ends[-1]] * (empty + 1 - len(ends))
        _write(self.cu_seqlens, [0, *ends])
        for bounds, _, classes in self._classes:
            there = {
                class_of(bounds, each.max_seqlen_q, each.max_seqlen_k): each
                for each in batch.classes(bounds)
            }
            for each in classes:
                number = class_of(bounds, each.max_seqlen_q, each.max_seqlen_k)
                each.hold(there.pop(number, None))
            assert not there, "a bucket holds the lengths of its batches"


def _write(target: Tensor, values: list[int]) -> None:
    """Numbers of the host into memory of the device, without waiting for it."""
    source = torch.tensor(values, dtype=target.dtype, pin_memory=target.is_cuda)
    target.copy_(source, non_blocking=True)


class _Captured:
    """One graph with the memory that it reads and writes."""

    def __init__(self, bucket: Bucket, like: Tensor, layers: Layers, recorder: _Recorder):
        self.rows = like.new_zeros(bucket.tokens, like.shape[1])
        self.batch = _StaticBatch(bucket, like.device)
        self.lengths: tuple[int, ...] | None = None
        self.replay, self.out = recorder.capture(
            lambda: encode_layers(self.rows, self.batch, layers)
        )

    def __call__(self, rows: Tensor, batch: PackedBatch) -> Tensor:
        count = rows.shape[0]
        self.rows[:count].copy_(rows)
        if self.lengths != batch.lengths:
            self.batch.hold(batch)
            self.lengths = batch.lengths
        self.replay()
        return self.out[:count].clone()


class _Recorder:
    """Captures functions into graphs that share their temporary memory, and keeps their replays
    one behind the other."""

    def __init__(self, device: torch.device):
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream, self._done = torch.cuda.Stream(), torch.cuda.Event()

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Run a function and record what it launches.

        Returns:
            What launches all of it again, and the tensor that it writes.
        """
        with torch.cuda.device(self._device):
            before, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
            self._stream.wait_stream(before)
            try:
                with torch.cuda.stream(self._stream):
                    for _ in range(_WARM_UPS):
                        function()
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    out = function()
            finally:
                torch.cuda.set_stream(before)  # a capture that fails leaves its own
            before.wait_stream(self._stream)
        return graph.replay, out

    @contextmanager
    def turn(self) -> Iterator[None]:
        """For the length of a replay, whose memory others share: behind the last one, on whatever
        stream that was."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)
        yield
        self._done.record(stream)

    def close(self) -> None:
        """Wait until nothing runs any more that is about to be given up."""
        torch.cuda.synchronize(self._device)


def _switches() -> tuple:
    """What decides how the library multiplies, which a graph has fixed."""
    matmul = torch.backends.cuda.matmul
    return (
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
    )


class CudaGraphs:
    """Runs the layers of one model, by graphs where that is possible and a gain.

    May be called from several threads and on several streams; calls take turns. A copy of it, as
    of a model that is copied or pickled, has captured nothing yet.

    Args:
        max_tokens: larger batches keep the GPU busy by themselves and run without graphs.
        at_most: graphs; the one that was not used for longest is given up.
    """

    def __init__(self, max_tokens: int = 32768, at_most: int = 64):
        self.max_tokens, self.at_most = max_tokens, at_most
        self._lock = threading.RLock()
        self._recorder: _Recorder | None = None
        self._made_for: tuple | None = None
        self._captured: OrderedDict[Bucket, _Captured] = OrderedDict()
        self._gave_up = False

    def __reduce__(self):
        return CudaGraphs, (self.max_tokens, self.at_most)

    @property
    def buckets(self) -> list[Bucket]:
        """What there are graphs for, the one used last at the end."""
        return list(self._captured)

    def __call__(
        self,
        rows: Tensor,
        batch: PackedBatch | PaddedBatch,
        layers: Layers,
        otherwise: Callable[..., Tensor] = encode_layers,
    ) -> Tensor:
        """`fastbert.encoder.encode_layers`, whose arguments these are; ``otherwise`` does the same
        and runs where there is no graph."""
        if self._takes(rows, batch, layers):
            with self._lock:
                captured = self._of(rows, batch, layers)
                if captured is not None:
                    with self._recorder.turn():
                        return captured(rows, batch)
        return otherwise(rows, batch, layers)

    def forget(self) -> None:
        """Give up all graphs and their memory. They are captured again when they are needed."""
        with self._lock:
            if self._recorder is not None:
                self._recorder.close()
            self._recorder = self._made_for = None
            self._captured.clear()
            self._gave_up = False

    def _takes(self, rows: Tensor, batch: PackedBatch | PaddedBatch, layers: Layers) -> bool:
        return (
            _on_gpu(rows)
            and isinstance(batch, PackedBatch)
            and batch.bias is None
            and 0 < batch.num_tokens <= self.max_tokens
            and bool(layers.tensors)
            and not capturing(rows.device)
            and only_kernels(rows, layers.tensors, layers.each[0].head_size)
        )

    def _of(self, rows: Tensor, batch: PackedBatch, layers: Layers) -> _Captured | None:
        """The graph for a batch, captured now if there is none; None if that fails."""
        made_for = (layers, rows.device, _switches(), *map(Tensor.data_ptr, layers.tensors))
        if made_for != self._made_for:
            self.forget()
            self._made_for = made_for
        if self._gave_up:
            return None
        bucket = bucket_of(batch)
        found = self._captured.get(bucket)
        if found is not None:
            self._captured.move_to_end(bucket)
            return found
        if self._recorder is None:
            self._recorder = _Recorder(rows.device)
        try:
            # Outside of inference mode, whose tensors cannot be written to anywhere else.
            with torch.inference_mode(False), torch.no_grad():
                found = _Captured(bucket, rows, layers, self._recorder)
        except Exception as error:
            self._gave_up = True
            _log.warning(
                "fastbert runs without CUDA graphs, since one could not be captured: %s",
                " ".join(str(error).split())[:300],
            )
            return None
        if len(self._captured) >= self.at_most:
            self._recorder.close()
            self._captured.popitem(last=False)
        self._captured[bucket] = found
        return found


def _on_gpu(rows: Tensor) -> bool:
    return rows.is_cuda
