"""Clocks and providers with made-up times, for the tests of the benchmark suite."""

import contextlib
import types

import torch
from fastbert.benchmarks.timing import Sample
from fastbert.benchmarks.workload import Prepared, Workload, checked_against


class FakeClock:
    """Says that every call takes a millisecond, or what ``seconds(run)`` says."""

    how = "made-up times"

    def __init__(self, seconds=lambda run: 1e-3, device=None):
        self.seconds, self.device, self.prepared = seconds, device, 0

    def prepare(self, run, inputs):
        self.prepared += 1
        return lambda: Sample(self.seconds(run), self.device)


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


class FakeCuda:
    """A GPU whose kernel takes ``each`` seconds, with events, a spin and graphs on its own time."""

    def __init__(self, each, capturable=True):
        self.each, self.capturable = each, capturable
        self.now, self.graphs, self.inputs, self.recording = 0.0, 0, [], None

    def kernel(self, x):
        if self.recording is not None:
            self.recording.append(x)
            if not self.capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
            return
        self.inputs.append(x)
        self.now += self.each

    def install(self, monkeypatch):
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = fake.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Graph:
            def replay(self):
                for x in self.work:
                    fake.inputs.append(x)
                    fake.now += fake.each

        @contextlib.contextmanager
        def graph(g):
            fake.recording = []
            try:
                yield
            finally:
                g.work, fake.recording = fake.recording, None
            fake.graphs += 1

        cuda = types.SimpleNamespace(
            Event=Event, CUDAGraph=Graph, graph=graph, synchronize=lambda: None,
            _sleep=lambda cycles: None,
        )  # fmt: skip
        monkeypatch.setattr(torch, "cuda", cuda)
