"""One run of a suite: measure, keep every result as soon as it is there, write the reports."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .apart import Apart
from .catalogue import workloads
from .limits import Pace, datasheet, measure_limits
from .report import write_reports
from .results import Measurement, NotMeasured, Results, machine_facts
from .timing import Clock, WallClock, clock_for
from .workload import Started, Workload, measure

__all__ = ["RESULTS_NAME", "measuring", "new_results", "run_suite"]

RESULTS_NAME = "results.json"
OUT_OF_TIME = "the time budget of this run was spent"
Progress = Callable[[int, int, Workload, list[Measurement | NotMeasured]], None]


def new_results(device: str, clock: Clock, **settings: object) -> Results:
    """An empty file's worth: the machine and what it can do at most."""
    facts = machine_facts(device)
    limits = measure_limits(clock, device)
    sheet = {f"datasheet_{k}": v for k, v in datasheet(facts["device"]).items() if limits}
    return Results(machine=facts, settings={"clock": clock.how, **settings}, limits=limits | sheet)


Measure = Callable[[Workload, Iterable[str] | None, float], list[Measurement | NotMeasured]]


@contextmanager
def measuring(clock: Clock, device: str) -> Iterator[Measure]:
    """`measure` of a workload, a choice of providers and seconds, as both front ends want it.

    Whole models on a CPU run in processes of their own, one for each provider.
    """
    pace = Pace(clock, device)
    with Apart() as apart:

        def measured(workload, providers, seconds):
            alone = workload.level == "model" and isinstance(clock, WallClock)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of peers: prototypes, deprecated exporters
                return measure(
                    workload, clock, device, providers=providers, seconds=seconds, pace=pace,
                    start=apart.start if alone else Started,
                )  # fmt: skip

        yield measured


def run_suite(
    suite: str,
    folder: Path,
    *,
    device: str,
    clock: Clock | None = None,
    chosen: Iterable[Workload] | None = None,
    seconds: float = 5.0,
    time_budget: float | None = None,
    providers: Iterable[str] | None = None,
    progress: Progress = lambda *args: None,
    **settings: object,
) -> Results:
    """Run the workloads of a suite and write ``results.json``, ``report.md``, ``report.html``.

    The result file is written anew after each workload, so that an interrupted run keeps what it
    had; the reports are written at the end, interrupted or not.

    Args:
        suite: one of `catalogue.SUITES`.
        folder: where the files go; it is made.
        chosen: other workloads than the suite's.
        seconds: for the timed rounds of one workload.
        time_budget: seconds after which workloads are no longer started; they are listed as not
            measured.
        providers: a choice of providers; all if None.
        progress: told after each workload: index, count, workload, its entries.
        settings: what else the file should say of the run.
    """
    clock = clock or clock_for(device)
    begin = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RESULTS_NAME
    todo = list(workloads(device, suite) if chosen is None else chosen)
    providers = None if providers is None else set(providers)
    results = new_results(
        device, clock, suite=suite, seconds=seconds, time_budget=time_budget, **settings
    )
    torch.manual_seed(0)
    try:
        with measuring(clock, device) as measured:
            for i, workload in enumerate(todo):
                spent = time.monotonic() - begin
                if time_budget is not None and spent > time_budget:
                    names = workload.among(providers)
                    entries = [NotMeasured(workload.id, name, OUT_OF_TIME) for name in names]
                else:
                    entries = measured(workload, providers, seconds)
                for entry in entries:
                    results.add(entry)
                results.save(path)
                progress(i, len(todo), workload, entries)
    finally:
        results.settings["took_seconds"] = round(time.monotonic() - begin, 1)
        results.save(path)
        write_reports(Results.load(path), folder)  # they show what the file holds
    return results
