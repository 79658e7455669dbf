"""A workload, and the one way in which it is measured: check first, then time in turn.

A `Workload` names what is measured; its ``setup`` makes the inputs, a builder per provider and the
check. `measure` is the engine behind both ``pytest benchmarks/`` and ``fastbert bench``.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from fastbert.kernels._cost import Cost
from torch import Tensor

from fastbert.testing import assert_within_budget

from .results import DISTURBED, Check, Measurement, NotMeasured
from .timing import Clock, NoClock, Sample, interleave, off_the_default_stream

__all__ = [
    "OURS",
    "Prepared",
    "Started",
    "Unavailable",
    "Workload",
    "WrongResult",
    "checked_against",
    "measure",
]

OURS = "fastbert"
# A peer computes the same thing with rounding of its own; fastbert is held to twice torch's error.
_OWN_FACTOR, _PEER_FACTOR = 2, 32
_LONG = 30.0  # seconds; rounds that took longer are not repeated


class Unavailable(Exception):
    """A provider cannot run here; the text says why."""


class WrongResult(Exception):
    """A provider's output is not what the reference gives."""


@dataclass
class Prepared:
    """A workload with its tensors on a device.

    Attributes:
        inputs: sets that are rotated; ``inputs[0]`` is the one that is checked.
        providers: name -> builder of the callable that is timed; builders may raise `Unavailable`.
        check: (provider, what is shown of the output for ``inputs[0]``) -> `Check`; raises
            `WrongResult`.
        cost: least work of one call; None where it makes no sense.
        tokens: real tokens of one call.
        shown: what is compared of an output, if it is not all of it.
    """

    inputs: list[Any]
    providers: dict[str, Callable[[], Callable[[Any], Any]]]
    check: Callable[[str, Any], Check]
    cost: Cost | None
    tokens: int
    shown: Callable[[Any], Any] = lambda output: output


@dataclass(frozen=True)
class Workload:
    """What is measured. ``params`` and ``op`` identify it in result files."""

    op: str
    level: str  # "kernel" or "model"
    params: dict[str, Any]
    dtype: torch.dtype
    setup: Callable[[Workload, str], Prepared]
    providers: tuple[str, ...]
    suites: frozenset[str] = frozenset()
    priority: int = 5  # smaller comes first
    reference: str = "transformers sdpa"  # what ratios are relative to

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def id(self) -> str:
        """``op/sizes/.../dtype``: ``B8``, a name such as ``base``, a flag such as ``residual``."""
        parts = [
            key if value is True else f"{key}{value}" if len(key) == 1 else str(value)
            for key, value in self.params.items()
            if value is not False
        ]
        return "/".join([self.op, *parts, self.dtype_name])

    def __str__(self) -> str:
        return self.id

    def among(self, providers: Iterable[str] | None) -> list[str]:
        """Its providers that are in a choice; all if that is None."""
        wanted = self.providers if providers is None else set(providers)
        return [name for name in self.providers if name in wanted]


def checked_against(
    provider: str, actual: Iterable[Tensor], oracle: Iterable[Tensor], baseline: Iterable[Tensor]
) -> Check:
    """The outcome of comparing outputs with fp64, in units of what torch is off by in that dtype.

    The budget is that of `fastbert.testing.assert_within_budget`, for a peer sixteen times as wide:
    enough to tell another rounding from another function. The check holds the largest error.

    Raises:
        WrongResult: over the budget, not finite, or another shape.
    """
    factor = _OWN_FACTOR if provider.startswith(OURS) else _PEER_FACTOR
    try:
        compared = [
            assert_within_budget(got, exact, torchs, provider, factor=factor)
            for got, exact, torchs in zip(actual, oracle, baseline, strict=True)
        ]
    except AssertionError as error:
        raise WrongResult(str(error)) from error
    return Check(True, *max(compared), against="fp64")


class Started:
    """A provider of a workload that was built and called once, in this process.

    Attributes:
        shown: what is compared of its output for ``prepared.inputs[0]``.
    """

    def __init__(self, workload: Workload, prepared: Prepared, provider: str, device: str):
        self._run = prepared.providers[provider]()
        self._inputs, self._device = prepared.inputs, device
        self.shown = prepared.shown(self._run(self._inputs[0]))

    def prepare(self, clock: Clock) -> Callable[[], Sample]:
        """Warm it up; the result times it once."""
        return clock.prepare(self._run, self._inputs)

    def peak_memory(self) -> int | None:
        """Bytes a call needs on top of what is already allocated; None on a CPU."""
        if self._device != "cuda":
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self._run(self._inputs[0])
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


Start = Callable[[Workload, Prepared, str, str], Started]


def measure(
    workload: Workload,
    clock: Clock,
    device: str,
    *,
    providers: Iterable[str] | None = None,
    seconds: float = 5.0,
    pace: Callable[[], float | None] = lambda: None,
    start: Start = Started,
) -> list[Measurement | NotMeasured]:
    """Check every provider of a workload, then time those that are right, in turn.

    Args:
        clock: what times; a `NoClock` checks only.
        device: ``"cpu"`` or ``"cuda"``.
        providers: a choice of them; all if None.
        seconds: how long the timed rounds may take together.
        pace: how slow the machine is (`fastbert.benchmarks.limits.Pace`), asked before and after
            the timed rounds. Rounds in which it was disturbed are timed once more if that does not
            take long, and the calmer ones count.
        start: how a provider is built: here, or in a process of its own (`Apart.start`).

    Returns:
        One entry per provider, in their order. A provider that cannot run or gives a wrong result
        is a `NotMeasured` that says why; a wrong result has ``failed`` set.
    """
    with off_the_default_stream(device):
        found = _measure(workload, clock, device, workload.among(providers), seconds, pace, start)
    gc.collect()
    return found


def _measure(
    workload: Workload,
    clock: Clock,
    device: str,
    chosen: list[str],
    seconds: float,
    pace: Callable[[], float | None],
    start: Start,
) -> list[Measurement | NotMeasured]:
    found: dict[str, Measurement | NotMeasured] = {}
    checks: dict[str, Check] = {}
    calls: dict[str, Callable[[], Sample]] = {}
    built: dict[str, Started] = {}
    try:
        prepared = workload.setup(workload, device)
    except Exception as error:  # after a broken kernel the device may refuse everything
        return [_broken(workload, name, error, "its setup: ") for name in chosen]
    for name in chosen:
        try:
            one = start(workload, prepared, name, device)
            checks[name] = prepared.check(name, one.shown)
            if isinstance(clock, NoClock):
                found[name] = NotMeasured(workload.id, name, f"{clock.how}; its result is right")
                continue
            calls[name] = one.prepare(clock)
            built[name] = one
        except Exception as error:  # a peer that breaks must not cost everybody else's numbers
            found[name] = _broken(workload, name, error)
    samples, strayed = _calm_samples(calls, seconds, pace) if calls else ({}, None)
    for name, taken in samples.items():
        found[name] = Measurement(
            workload=workload.id,
            op=workload.op,
            level=workload.level,
            params=workload.params,
            dtype=workload.dtype_name,
            provider=name,
            reference=workload.reference,
            check=checks[name],
            wall=[s.wall for s in taken],
            device=None if taken[0].device is None else [s.device for s in taken],
            tokens=prepared.tokens,
            flops=prepared.cost.flops if prepared.cost else None,
            bytes=prepared.cost.bytes if prepared.cost else None,
            peak_memory=built[name].peak_memory(),
            how=clock.how,
            pace=strayed,
        )
    return [found[name] for name in chosen]


def _calm_samples(
    calls: dict[str, Callable[[], Sample]], seconds: float, pace: Callable[[], float | None]
) -> tuple[dict[str, list[Sample]], float | None]:
    """Samples of each provider, and the slower of the paces around them."""
    attempts = []
    before = pace()
    while True:
        begin = time.perf_counter()
        samples = interleave(calls, seconds=seconds)
        took = time.perf_counter() - begin
        after = pace()
        if before is None or after is None:
            return samples, None
        attempts.append((max(before, after), samples))
        if attempts[-1][0] <= DISTURBED or len(attempts) == 2 or took > _LONG:
            break
        before = after
    strayed, samples = min(attempts, key=lambda attempt: attempt[0])
    return samples, float(f"{strayed:.3g}")


def _broken(workload: Workload, name: str, error: Exception, where: str = "") -> NotMeasured:
    """Why a provider has no time. That of ours is a failure, whatever it raised."""
    if isinstance(error, Unavailable):
        return NotMeasured(workload.id, name, str(error))
    if isinstance(error, WrongResult):
        return NotMeasured(workload.id, name, f"wrong result: {error}", failed=True)
    if isinstance(error, torch.OutOfMemoryError):
        return NotMeasured(workload.id, name, f"{where}out of memory")
    why = f"{where}{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return NotMeasured(workload.id, name, why, failed=name.startswith(OURS))
