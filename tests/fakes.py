"""Clocks and providers with made-up times, for the tests of the benchmark suite."""

import contextlib
import os
import time
import types

import torch
from fastbert.benchmarks import timing
from fastbert.benchmarks.results import Check
from fastbert.benchmarks.timing import Sample
from fastbert.benchmarks.workload import Prepared, Unavailable, Workload, checked_against


class FakeClock:
    """Says that every call takes a millisecond, or what ``seconds(run)`` says."""

    how = "made-up times"

    def __init__(self, seconds=lambda run: 1e-3, device=None):
        self.seconds, self.device, self.prepared = seconds, device, 0

    def prepare(self, run, inputs):
        self.prepared += 1
        return lambda: Sample(self.seconds(run), self.device)


class FixedClock:
    """A `FakeClock` that can be sent to another process."""

    how = "made-up times"

    def prepare(self, run, inputs):
        return lambda: Sample(2.0)


class FakeTime:
    """The time that a module of the benchmarks sees: it passes when something sleeps."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def install(self, monkeypatch) -> None:
        monkeypatch.setattr(timing, "time", self)


def workload_of(providers, name="double"):
    """``x * 2``, by the given functions; their exceptions come from the builder's callable."""

    def setup(workload, device):
        x = torch.linspace(-1, 1, 64)

        def check(provider, output):
            return checked_against(provider, [output], [x.double() * 2], [x * 2])

        builders = {n: (lambda run=run: run) for n, run in providers.items()}
        return Prepared([x], builders, check, None, 64)

    return Workload(
        name, "model", {"N": 64}, torch.float32, setup, tuple(providers), reference="peer"
    )


class Peculiar(Exception):
    """Cannot be made from its words alone."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def _setup_apart(workload, device):
    """Which process a provider runs in, and what may happen to it there."""

    def absent():
        raise Unavailable("absent is not installed")

    def peculiar():
        raise Peculiar("this", "that")

    def check(provider, process):
        return Check(True, 0.0, float(process), "itself")

    def dies(x):
        os._exit(7)

    builders = {"mine": lambda: lambda x: os.getpid(), "absent": absent, "peculiar": peculiar,
                "dies": lambda: dies}  # fmt: skip
    builders["other"] = builders["mine"]
    return Prepared([None], builders, check, None, 1, shown=float)


def workload_apart(*providers):
    """One that can be sent to another process; the budget that is recorded is its number."""
    return Workload("apart", "model", {}, torch.float32, _setup_apart, providers, reference="mine")


class FakeCuda:
    """A GPU whose kernel takes ``each`` seconds, with events, a spin and graphs on its own time.

    Queueing a kernel takes ``host`` seconds of the host; the device begins one when it is free and
    the host has queued it, so that a slow host leaves gaps.
    """

    def __init__(self, each, *, host=0.0, capturable=True):
        self.each, self.host, self.capturable = each, host, capturable
        self.host_now = self.device_free = 0.0
        self.graphs, self.inputs, self.recording = 0, [], None

    def _run(self, x):
        self.inputs.append(x)
        self.device_free = max(self.device_free, self.host_now) + self.each

    def kernel(self, x):
        if self.recording is not None:
            self.recording.append(x)
            if not self.capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
            return
        self.host_now += self.host
        self._run(x)

    def _synchronize(self):
        self.host_now = max(self.host_now, self.device_free)

    def _sleep(self, cycles):
        self.device_free = max(self.device_free, self.host_now) + cycles / 2e9

    def install(self, monkeypatch):
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(fake.device_free, fake.host_now)

            def synchronize(self):
                fake._synchronize()

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Graph:
            def replay(self):
                for x in self.work:
                    fake._run(x)

        @contextlib.contextmanager
        def graph(g, stream):
            assert stream == "a stream"
            fake.recording = []
            try:
                yield
            finally:
                g.work, fake.recording = fake.recording, None
            fake.graphs += 1

        cuda = types.SimpleNamespace(
            Event=Event, CUDAGraph=Graph, graph=graph, synchronize=self._synchronize,
            _sleep=self._sleep, current_stream=lambda: "a stream",
            set_stream=lambda stream: None,
        )  # fmt: skip
        monkeypatch.setattr(torch, "cuda", cuda)
        monkeypatch.setattr(time, "perf_counter", lambda: fake.host_now)
