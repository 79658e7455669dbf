"""Clocks: how long a call takes, on a CPU and on a GPU, with several callables taken in turn.

A clock turns a callable and its input sets into a function that gives one `Sample`. Everything
that touches a real timer is behind `Clock.prepare`, so that tests can put a fake one there.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

__all__ = [
    "Clock", "CudaClock", "NoClock", "Sample", "WallClock", "clock_for", "cold_sets", "interleave",
    "off_the_default_stream",
]  # fmt: skip

Run = Callable[[Any], Any]
_SHORTEST_SAMPLE = 2e-3  # seconds; shorter calls are repeated within a sample
_MIN_ROUNDS, _MAX_ROUNDS = 5, 60
_SLOW_ROUND = 15.0  # seconds; after such a round three are enough
# Threads of one library spin for a while after its call and would slow the next one's down: those
# of ONNX Runtime for 32 ms, of torch for 10 (OpenMP), of OpenVINO and CTranslate2 for 1.
_PAUSE = 40e-3
_WARM_BELOW = 0.1  # seconds; shorter calls are made once more after a pause, untimed
_GRAPH_BELOW = 100e-6  # seconds; event pairs around shorter work time the host
# The device spins while the host queues: twice as long as that takes, in cycles of a fast clock.
_SHORTEST_SPIN, _LONGEST_SPIN, _CYCLES_PER_SECOND = 0.5e-3, 0.5, 2e9
_COLD_BYTES = 256 * 2**20  # input sets are rotated until they exceed this: past every L2 cache


@dataclass(frozen=True)
class Sample:
    """Seconds of one call: on the wall, and on the device where there is one."""

    wall: float
    device: float | None = None


class Clock(Protocol):
    """Times a callable. ``how`` says in words what its numbers are."""

    how: str

    def prepare(self, run: Run, inputs: Sequence[Any]) -> Callable[[], Sample]:
        """Warm ``run`` up on all inputs; the result times it once, on the next inputs in turn."""
        ...


class WallClock:
    """For work on the CPU. Calls shorter than 2 ms are repeated within one sample."""

    how = "wall clock, calls in turn"

    def prepare(self, run: Run, inputs: Sequence[Any]) -> Callable[[], Sample]:
        once = math.inf
        for _ in range(3):
            for x in inputs:
                start = time.perf_counter()
                run(x)
                once = min(once, time.perf_counter() - start)
            if once > _WARM_BELOW:
                break
        count = max(1, math.ceil(_SHORTEST_SAMPLE / once))
        turn = _turns(inputs)

        def sample() -> Sample:
            time.sleep(_PAUSE)
            if once < _WARM_BELOW:
                run(next(turn))
            taken = [next(turn) for _ in range(count)]
            start = time.perf_counter()
            for x in taken:
                run(x)
            return Sample((time.perf_counter() - start) / count)

        return sample


class CudaClock:
    """For work on a GPU: device time by events and wall time with synchronisation.

    Kernels shorter than 100 us are timed inside a replayed CUDA graph where they can be captured,
    else behind work that keeps the device busy while they are queued. The caller rotates over input
    sets that do not fit the cache together, so that every call finds it cold.
    """

    how = "CUDA events (graph replay below 100 us), cold cache, and wall clock with synchronisation"

    def prepare(self, run: Run, inputs: Sequence[Any]) -> Callable[[], Sample]:
        def all_inputs() -> None:
            for x in inputs:
                run(x)

        for _ in range(3):
            all_inputs()
            torch.cuda.synchronize()
        start = time.perf_counter()
        all_inputs()
        ahead = min(_LONGEST_SPIN, 2 * (time.perf_counter() - start))
        torch.cuda.synchronize()
        work, spin = all_inputs, ahead
        if self._between(all_inputs, ahead) / len(inputs) < _GRAPH_BELOW:
            replay = self._capture(all_inputs)
            if replay is not None:
                work, spin = replay, 0.0
        turn = _turns(inputs)

        def sample() -> Sample:
            device = self._between(work, spin) / len(inputs)
            torch.cuda.synchronize()
            start = time.perf_counter()
            run(next(turn))
            torch.cuda.synchronize()
            return Sample(time.perf_counter() - start, device)

        return sample

    @staticmethod
    def _between(work: Callable[[], Any], spin: float) -> float:
        """Seconds on the device. It spins first, so that the host has queued all when it begins;
        work that waits for the device itself cannot be queued and is timed with its gaps."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(max(spin, _SHORTEST_SPIN) * _CYCLES_PER_SECOND))
        start.record()
        work()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)

    @staticmethod
    def _capture(work: Callable[[], Any]) -> Callable[[], None] | None:
        """A graph of the work, or None if it cannot be captured."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=stream):
                work()
        except Exception:  # host synchronisation, a graph of its own, ...: it is timed queued then
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own as the current one
            torch.cuda.synchronize()
            return None
        graph.replay()
        return graph.replay


class NoClock:
    """Where a time would mean nothing, under Triton's interpreter: everything else happens."""

    how = "not measured: kernels are interpreted"

    def prepare(self, run: Run, inputs: Sequence[Any]) -> Callable[[], Sample]:
        raise NotImplementedError(self.how)


def clock_for(device: str) -> Clock:
    """The clock of a device, or the one that refuses where kernels are interpreted."""
    from fastbert.ops.backend import interpreting

    if device == "cuda":
        return CudaClock()
    return NoClock() if interpreting() else WallClock()


@contextmanager
def off_the_default_stream(device: str) -> Iterator[None]:
    """Work inside goes to a stream of its own, where a GPU can capture it: the default one cannot
    be captured, and autograd runs backward on the stream that its forward ran on."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
        torch.cuda.synchronize()


def cold_sets(bytes_per_set: float, device: str) -> int:
    """How many input sets to rotate so that none is in the cache when its turn comes."""
    if device != "cuda" or bytes_per_set <= 0:
        return 1
    return max(1, min(32, math.ceil(_COLD_BYTES / bytes_per_set)))


def interleave(
    calls: dict[str, Callable[[], Sample]], *, seconds: float, max_rounds: int = _MAX_ROUNDS
) -> dict[str, list[Sample]]:
    """Samples of each, one per round, in another order in each round.

    Neighbouring samples share what the machine was doing, so that ratios of the same round cancel
    it; a changing order keeps one provider from always running in the wake of another. At least
    five rounds (three if a round takes longer than 15 seconds), then until ``seconds`` have passed
    or ``max_rounds`` are done.
    """
    order, shuffle = list(calls), random.Random(0).shuffle
    samples: dict[str, list[Sample]] = {name: [] for name in order}
    begin = time.perf_counter()
    for i in range(max(max_rounds, _MIN_ROUNDS)):
        spent = time.perf_counter() - begin
        enough = 3 if i and spent / i > _SLOW_ROUND else _MIN_ROUNDS
        if i >= enough and spent > seconds:
            break
        shuffle(order)
        for name in order:
            samples[name].append(calls[name]())
    return samples


def _turns(inputs: Sequence[Any]):
    while True:
        yield from inputs
