"""What this machine can do at most, measured in the same run as everything else."""

from __future__ import annotations

import torch

from .timing import Clock, NoClock, interleave

__all__ = ["datasheet", "measure_limits"]


def measure_limits(clock: Clock, device: str) -> dict[str, float]:
    """Copy bandwidth in GB/s (read plus written) and matrix rates in TFLOP/s by dtype.

    The best of a few samples: a limit is what the machine reaches when nothing disturbs it.
    Empty where nothing can be timed.
    """
    if isinstance(clock, NoClock):
        return {}
    on_gpu = device == "cuda"
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if on_gpu else (torch.float32,)
    count = 2**28 if on_gpu else 2**24
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    calls = {"copy_gbs": clock.prepare(lambda x: target.copy_(x), [source])}
    work = {"copy_gbs": 2.0 * source.numel() * source.itemsize / 1e9}
    size = 8192 if on_gpu else 1024
    for dtype in dtypes:
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        name = f"matmul_tflops_{str(dtype).removeprefix('torch.')}"
        calls[name] = clock.prepare(lambda x, b=b: x @ b, [a])
        work[name] = 2.0 * size**3 / 1e12
    samples = interleave(calls, seconds=2.0)
    return {
        name: float(f"{work[name] / min(s.device or s.wall for s in taken):.4g}")
        for name, taken in samples.items()
    }


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
