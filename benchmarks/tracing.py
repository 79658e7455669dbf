"""One forward pass on a GPU: time per kernel, gaps between them, share of the roofline."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["KernelTime", "Profile", "profile_forward", "summarise"]


@dataclass(frozen=True)
class KernelTime:
    """All launches of a kernel."""

    name: str
    launches: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    """Where the time of one pass went.

    Attributes:
        kernels: the most expensive first.
        span: from the first kernel's start to the last one's end, seconds.
        busy: of it, with at least one kernel running.
        largest_gap: longest time without one.
        least: what the work takes at the limits of the machine; None if unknown.
    """

    kernels: list[KernelTime]
    span: float
    busy: float
    largest_gap: float
    least: float | None = None

    @property
    def idle_share(self) -> float:
        """Share of the span in which no kernel ran: launch gaps."""
        return 1 - self.busy / self.span if self.span else 0.0

    @property
    def roofline_share(self) -> float | None:
        """Least time over the span."""
        return None if self.least is None or not self.span else self.least / self.span


def summarise(launches: Iterable[tuple[str, float, float]], least: float | None = None) -> Profile:
    """Add up launches (name, start, duration), in seconds; overlapping ones count once in ``busy``.

    Raises:
        ValueError: no launch.
    """
    ordered = sorted(launches, key=lambda launch: launch[1])
    if not ordered:
        raise ValueError("profile: expected kernels on a GPU, the trace has none")
    totals: dict[str, tuple[int, float]] = {}
    busy = gap = 0.0
    end = ordered[0][1]
    for name, start, duration in ordered:
        count, seconds = totals.get(name, (0, 0.0))
        totals[name] = (count + 1, seconds + duration)
        gap = max(gap, start - end)
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    kernels = [KernelTime(name, *total) for name, total in totals.items()]
    kernels.sort(key=lambda k: -k.seconds)
    return Profile(kernels, end - ordered[0][1], busy, gap, least)


def profile_forward(run, *, least: float | None = None, warmup: int = 5) -> Profile:
    """Trace one call of ``run`` on the current GPU, after a warm-up.

    Args:
        least: seconds that the work takes at the limits of the machine.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    for _ in range(warmup):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        run()
        torch.cuda.synchronize()
    launches = [
        (event.name, 1e-6 * event.time_range.start, 1e-6 * event.time_range.elapsed_us())
        for event in trace.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return summarise(launches, least)
