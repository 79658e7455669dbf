"""Searching tiles: every candidate is compiled and screened first, then timed where there is a GPU.

With a GPU the survivors are timed on a real problem, in turn, each after a parity check, and the
tile table gets the fastest. Without one they are ranked by a static model - instructions per
element over the warps that can hide their latency - which is only that: it has no memory system and
no scheduler in it, and nothing is written from it.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastbert.benchmarks.kernel_workloads import kernel as kernel_workload
from fastbert.benchmarks.results import Measurement
from fastbert.benchmarks.timing import Clock
from fastbert.benchmarks.workload import OURS, Workload, measure

from ..kernels import _tiles

if TYPE_CHECKING:
    from ..kernels._variants import Variant

__all__ = [
    "Candidate", "Problem", "problems", "screen_candidates", "time_candidates", "variants_of_slot",
    "write_tuned",
]  # fmt: skip

_ENOUGH_WARPS = 16  # resident on a multiprocessor; fewer leave latency in sight
_MARK = 32  # warps, as no tile has: shows which variants a slot decides
_WORTH_IT = 0.97  # of the table's time: a smaller gain is noise


@dataclass(frozen=True)
class Problem:
    """One slot of the tile tables: where it is decided, what it is timed on, what is tried."""

    slot: str
    workload: Workload
    grid: tuple[dict[str, int], ...]


@dataclass(frozen=True)
class Candidate:
    """A tile with what the compiler made of it. ``seconds`` where it was timed."""

    fields: dict[str, int]
    facts: dict[str, Any]
    seconds: float | None = None

    @property
    def static_cost(self) -> float:
        """Issue slots per element, more where too few warps are resident. A ranking, not a time."""
        waiting = min(1.0, self.facts["warps_per_sm"] / _ENOUGH_WARPS)
        return self.facts["instructions_per_element"] / waiting if waiting else math.inf


def _grid(**values: tuple[int, ...]) -> tuple[dict[str, int], ...]:
    return tuple(
        dict(zip(values, choice, strict=True)) for choice in itertools.product(*values.values())
    )


def problems(kernel: str) -> Iterator[Problem]:
    """The slots of a kernel that are worth tuning, in bf16.

    Raises:
        ValueError: an unknown kernel.
    """
    half = torch.bfloat16
    if kernel == "attention":
        for d in (32, 64, 128):
            for length, tag in ((64, "S<=64"), (128, "S<=128"), (512, "long")):
                workload = kernel_workload(
                    "attention", B=32768 // length, S=length, H=12, D=d, dtype=half
                )
                single = tag != "long"
                grid = _grid(
                    block_m=(16, 32, 64, 128) if single else (64, 128),
                    block_n=(length,) if single else (32, 64, 128),
                    num_warps=(4, 8),
                    num_stages=(1, 2) if single else (2, 3, 4),
                )
                yield Problem(f"attention D{d} 16 bit {tag}", workload, grid)
    elif kernel in ("layernorm", "softmax"):
        op = "layer norm" if kernel == "layernorm" else "softmax"
        for width in (384, 768, 1024) if kernel == "layernorm" else (128, 512):
            slot = f"{kernel} {_tiles.next_power_of_2(width)}"
            workload = kernel_workload(op, M=32768, N=width, dtype=half)
            yield Problem(slot, workload, _grid(rows=(1, 2, 4, 8, 16), num_warps=(1, 2, 4, 8)))
    elif kernel == "linear":
        workload = kernel_workload("linear + GELU", M=32768, N=3072, K=768, dtype=half)
        grid = _grid(
            block_m=(64, 128, 256), block_n=(64, 128, 256), block_k=(32, 64), num_warps=(4, 8),
            num_stages=(2, 3, 4),
        )  # fmt: skip
        yield Problem("linear 16 bit", workload, grid)
    else:
        raise ValueError(f"tune: expected attention, layernorm, softmax or linear, got {kernel!r}")


def variants_of_slot(arch: int, slot: str, fields: dict[str, int]) -> list[Variant]:
    """Every variant of every kernel that takes its tile from a slot, with these fields in it."""
    from ..kernels._variants import KERNELS, variants

    def everything(**slot_fields: int) -> list[Variant]:
        with _tiles.tuned(arch, slot, slot_fields):
            return [v for k in KERNELS for v in variants(k, arch, dtypes=(torch.bfloat16,))]

    marked = everything(num_warps=_MARK)
    return [
        variant
        for variant, mark in zip(everything(**fields), marked, strict=True)
        if mark.num_warps == _MARK
    ]


def _facts(arch: int, slot: str, fields: dict[str, int]) -> dict[str, Any] | str:
    """What the compiler makes of a candidate, or why it may not ship: all variants of a slot must.

    The facts are those of the variant with the most work. Runs in a worker process.
    """
    from .inspection import inspect_variant

    try:
        chosen, every = variants_of_slot(arch, slot, fields), []
        for variant in chosen:
            every.append(found := inspect_variant(variant))
            if found.faults:
                return found.faults[0]
            if found.occupancy.programs == 0:
                return "does not fit a multiprocessor"
    except Exception as error:  # a tile that does not compile is no candidate
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    work = [variant.cost.flops + variant.cost.bytes for variant in chosen]
    return every[work.index(max(work))].facts()


def screen_candidates(
    problem: Problem,
    arch: int,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> tuple[list[Candidate], dict[str, int]]:
    """Compile all candidates of a slot in parallel and drop those that must not ship.

    Returns:
        The survivors, best by the static model first, and why the others were dropped: reason ->
        how many.
    """
    kept, dropped = [], {}
    count = len(problem.grid)
    context = get_context("spawn")  # Triton must be imported anew, not forked
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context) as pool:
        jobs = [pool.submit(_facts, arch, problem.slot, fields) for fields in problem.grid]
        for i, (fields, job) in enumerate(zip(problem.grid, jobs, strict=True)):
            facts = job.result()
            if isinstance(facts, str):
                reason = " ".join(w for w in facts.split() if not w.isdigit())
                dropped[reason] = dropped.get(reason, 0) + 1
            else:
                kept.append(Candidate(fields, facts))
            progress(i + 1, count)
    return sorted(kept, key=lambda c: c.static_cost), dropped


def time_candidates(
    problem: Problem,
    candidates: list[Candidate],
    arch: int,
    clock: Clock,
    device: str,
    *,
    seconds: float = 0.3,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> tuple[float, list[Candidate]]:
    """Time each candidate on the problem, after a parity check; wrong ones are left out.

    Returns:
        Seconds with the tables as they are, and the candidates with theirs, fastest first.
    """

    def timed() -> float | None:
        (entry,) = measure(problem.workload, clock, device, providers=[OURS], seconds=seconds)
        return entry.seconds if isinstance(entry, Measurement) else None

    before = timed()
    if before is None:
        raise RuntimeError(f"{problem.slot}: the present tile fails its check; see kernels check")
    found = []
    for i, candidate in enumerate(candidates):
        with _tiles.tuned(arch, problem.slot, candidate.fields):
            taken = timed()
        if taken is not None:
            found.append(Candidate(candidate.fields, candidate.facts, taken))
        progress(i + 1, len(candidates))
    return before, sorted(found, key=lambda c: c.seconds)


def write_tuned(path: Path, arch: int, slot: str, before: float, best: Candidate) -> bool:
    """Put the best tile of a slot into the table file, if it is worth it.

    Returns:
        Whether it was: more than 3 % faster than the tile that the tables had.
    """
    if best.seconds is None or best.seconds > _WORTH_IT * before:
        return False
    table = json.loads(path.read_text("utf-8")) if path.exists() else {}
    table.setdefault(f"sm_{arch}", {})[slot] = best.fields
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", "utf-8")
    os.replace(temporary, path)
    return True
