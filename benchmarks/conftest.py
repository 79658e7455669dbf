"""``pytest benchmarks/``: pytest-benchmark shows, stores and compares what `measure` timed.

A test is one provider on one workload. All chosen providers of a workload are measured together
when the first of them is due, checked and then timed in turn; each test hands its own samples to
the ``benchmark`` fixture, so that ``--benchmark-save``, ``--benchmark-compare`` and
``--benchmark-compare-fail`` work as everywhere. A wrong result is a failed test.
"""

from __future__ import annotations

import os
import statistics
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from fastbert.benchmarks.catalogue import SUITES, workloads
from fastbert.benchmarks.report import write_reports
from fastbert.benchmarks.results import Measurement, NotMeasured, Results
from fastbert.benchmarks.session import RESULTS_NAME, measuring, new_results
from fastbert.benchmarks.timing import NoClock, clock_for
from fastbert.benchmarks.workload import Workload

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser):
    group = parser.getgroup("fastbert")
    group.addoption("--suite", choices=SUITES, default="quick", help="what to run (quick)")
    group.addoption("--seconds", type=float, default=5.0, help="timed rounds per workload (5)")
    group.addoption("--results", type=Path, help="also write result file and reports here")


def pytest_configure(config):
    # Other libraries warn of prototypes and deprecations; that is not what is tested here.
    config.addinivalue_line("filterwarnings", "ignore")


class _Replay:
    """A timer that gives back durations that were measured before."""

    def __init__(self):
        self._now, self._pending = 0.0, []

    def load(self, durations: list[float]) -> None:
        """Next, for each duration: one reading, and one that is later by it."""
        self._pending = [step for d in durations for step in (0.0, d)]

    def __call__(self) -> float:
        self._now += self._pending.pop(0)
        return self._now


REPLAY = _Replay()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc):
    if {"workload", "provider"} <= set(metafunc.fixturenames):
        suite = metafunc.config.getoption("suite")
        cases = [
            pytest.param(w, provider, id=f"{w.id}-{provider}")
            for w in workloads(_device(), suite)
            for provider in w.providers
        ]
        metafunc.parametrize(("workload", "provider"), cases)


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY))


class _Session:
    """Measures each workload once, for the providers whose tests were selected."""

    def __init__(self, config: pytest.Config, items: list[pytest.Item], stack: ExitStack):
        self.stack = stack
        self.seconds, self.folder = config.getoption("seconds"), config.getoption("results")
        self.device = _device()
        self.clock = clock_for(self.device)
        self.chosen: dict[str, list[str]] = {}
        for item in items:
            params = getattr(item, "callspec", None) and item.callspec.params
            if params and {"workload", "provider"} <= set(params):
                self.chosen.setdefault(params["workload"].id, []).append(params["provider"])
        self.results = self.measured = None
        self._entries: dict[tuple[str, str], Measurement | NotMeasured] = {}

    def entry(self, workload: Workload, provider: str) -> Measurement | NotMeasured:
        if (workload.id, provider) not in self._entries:
            if self.results is None:
                self.results = new_results(self.device, self.clock, front_end="pytest")
                self.measured = self.stack.enter_context(measuring(self.clock, self.device))
            chosen = self.chosen.get(workload.id, [provider])
            for entry in self.measured(workload, chosen, self.seconds):
                self._entries[workload.id, entry.provider] = entry
                self.results.add(entry)
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.results.save(self.folder / RESULTS_NAME)
        return self._entries[workload.id, provider]


@pytest.fixture(scope="session")
def _bench_session(request):
    with ExitStack() as stack:
        session = _Session(request.config, request.session.items, stack)
        yield session
    if session.folder is not None and session.results is not None:
        write_reports(Results.load(session.folder / RESULTS_NAME), session.folder)


@pytest.fixture
def bench(benchmark, _bench_session):
    """``bench(workload, provider)``: red if its result is wrong, skipped if it cannot run here."""

    def run(workload: Workload, provider: str) -> None:
        entry = _bench_session.entry(workload, provider)
        if isinstance(entry, NotMeasured):
            benchmark.skipped = True  # no complaint that the fixture was not used
            if entry.failed:
                pytest.fail(entry.reason, pytrace=False)
            if isinstance(_bench_session.clock, NoClock):
                return  # checked, and that was all
            pytest.skip(f"not measured: {entry.reason}")
        reference = _bench_session._entries.get((workload.id, workload.reference))
        benchmark.group = workload.id
        benchmark.extra_info.update(
            provider=provider,
            clock=entry.how,
            error=entry.check.error,
            allowed=entry.check.budget,
            tokens_per_second=entry.tokens_per_second,
            tflops=entry.tflops,
            gbs=entry.gbs,
            share_of_limit=_bench_session.results.share_of_limit(entry),
            peak_memory=entry.peak_memory,
            median_wall=statistics.median(entry.wall),
            speedup=entry.speedup_over(reference) if isinstance(reference, Measurement) else None,
            limits=_bench_session.results.limits,
            machine=_bench_session.results.machine,
        )
        REPLAY.load(entry.times)
        benchmark.pedantic(lambda: None, rounds=len(entry.times), iterations=1)

    return run
