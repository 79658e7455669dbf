"""What this machine can do at most, measured in the same run as everything else, and whether it
still can: `Pace` times the same product between workloads."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastbert.ops import onednn

from .timing import Clock, NoClock, Sample, interleave

__all__ = ["Pace", "datasheet", "matrix_rate", "measure_limits"]


def measure_limits(clock: Clock, device: str) -> dict[str, float]:
    """Copy bandwidth in GB/s (read plus written) and matrix rates in TFLOP/s by dtype.

    The best of a few samples of the fastest route: a limit is what the machine reaches when nothing
    disturbs it. Empty where nothing can be timed.
    """
    if isinstance(clock, NoClock):
        return {}
    on_gpu = device == "cuda"
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if on_gpu else (torch.float32,)
    count = 2**28 if on_gpu else 2**24
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    calls = {("copy_gbs", ""): clock.prepare(lambda x: target.copy_(x), [source])}
    work = {"copy_gbs": 2.0 * source.numel() * source.itemsize / 1e9}
    for dtype in dtypes:
        name = f"matmul_tflops_{str(dtype).removeprefix('torch.')}"
        work[name], products = _large_products(clock, device, dtype)
        calls |= {(name, route): call for route, call in products.items()}
    samples = interleave(calls, seconds=2.0)
    best: dict[str, float] = {}
    for (name, _), taken in samples.items():
        rate = work[name] / min(s.device or s.wall for s in taken)
        best[name] = max(best.get(name, 0.0), float(f"{rate:.4g}"))
    return best


def matrix_rate(clock: Clock, device: str, dtype: torch.dtype, *, seconds: float) -> float | None:
    """The matrix rate of one dtype alone, in TFLOP/s; None where nothing can be timed."""
    if isinstance(clock, NoClock):
        return None
    work, products = _large_products(clock, device, dtype)
    samples = interleave(products, seconds=seconds)
    return work / min(s.device or s.wall for taken in samples.values() for s in taken)


def _large_products(
    clock: Clock, device: str, dtype: torch.dtype
) -> tuple[float, dict[str, Callable[[], Sample]]]:
    """Operations in units of 10^12, and every route to them."""
    size = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2.0 * size**3 / 1e12, {
        route: clock.prepare(product, [a]) for route, product in _products(b).items()
    }


def _products(b: torch.Tensor) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Every way to a product with ``b [K, N]``: on a CPU the library behind ``@`` may be the slower
    one."""
    found = {"matmul": lambda a: a @ b}
    if b.device.type == "cpu" and b.dtype == torch.float32 and onednn.available():
        weight = onednn.packed(b.t(), 1024)

        def packed(a: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                return onednn.product(a, weight, None, None)

        found["oneDNN, packed"] = packed
    return found


class Pace:
    """How slow the machine is at the moment: a fixed product's time over the shortest it ever took.

    1 is undisturbed. A CPU is shared with whatever else runs, on other machines of the same host
    too, and a workload that ran meanwhile has times that say little.
    """

    _SIZE = 512
    _TIMES = 15

    def __init__(self, clock: Clock, device: str):
        self._sample = None
        self._best = float("inf")
        if device == "cpu" and not isinstance(clock, NoClock):
            a, b = torch.randn(2, self._SIZE, self._SIZE)
            *_, product = _products(b).values()  # the one that models use
            self._sample = clock.prepare(product, [a])
            self()

    def __call__(self) -> float | None:
        """The pace now; None on a device that nobody shares, or that is not timed."""
        if self._sample is None:
            return None
        now = sorted(self._sample().wall for _ in range(self._TIMES))
        self._best = min(self._best, now[0])
        return now[self._TIMES // 2] / self._best


def datasheet(device_name: str) -> dict[str, float]:
    """The same figures as the vendor states them; empty for a device that is not in the table."""
    from fastbert.kernels._cards import card_named

    card = card_named(device_name)
    if card is None:
        return {}
    return {
        "copy_gbs": card.bandwidth,
        "matmul_tflops_bfloat16": card.matmul_16bit,
        "matmul_tflops_float16": card.matmul_16bit,
        "matmul_tflops_float32": card.fp32,
    }
