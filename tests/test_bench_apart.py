"""Each provider of a model has a process of its own on a CPU."""

import dataclasses
import os
import pickle
import signal

import pytest
from fakes import FakeClock, FixedClock, workload_apart, workload_of
from fastbert.benchmarks import apart, session
from fastbert.benchmarks.apart import Apart
from fastbert.benchmarks.catalogue import SUITES, workloads
from fastbert.benchmarks.results import Measurement
from fastbert.benchmarks.timing import WallClock
from fastbert.benchmarks.workload import OURS, Started, measure
from forked import context


@pytest.mark.slow
def test_every_provider_of_a_model_has_a_process_of_its_own_while_it_lasts(monkeypatch):
    monkeypatch.setattr(apart.multiprocessing, "get_context", lambda method: context())
    names = ("mine", "other", "absent", "peculiar", "dies")
    with Apart() as processes_of:
        first, second = (
            dict(zip(names, measure(workload_apart(*names), FixedClock(), "cpu", seconds=0.0,
                                    start=processes_of.start), strict=True))
            for _ in range(2)
        )  # fmt: skip
        processes = {first[name].check.budget for name in ("mine", "other")}
        assert len(processes) == 2 and os.getpid() not in processes
        assert processes == {second[name].check.budget for name in ("mine", "other")}
        assert set(first["mine"].wall) == {2.0} and first["mine"].peak_memory is None
        killed = int(first["mine"].check.budget)
        os.kill(killed, signal.SIGKILL)
        processes_of._children["mine"]._process.join()
        (third,) = measure(
            workload_apart("mine"), FixedClock(), "cpu", seconds=0.0, start=processes_of.start
        )
        assert third.check.budget not in (killed, os.getpid())
        processes.add(third.check.budget)
    for entries in (first, second):
        assert entries["absent"].reason == "absent is not installed"
        assert entries["peculiar"].reason == "RuntimeError: Peculiar: this and that"
        assert entries["dies"].reason == "RuntimeError: the process of dies ended with 7"
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)


def test_every_model_of_every_suite_can_be_sent_to_a_process():
    sent = [w for suite in SUITES for w in workloads("cpu", suite) if w.level == "model"]
    assert len({w.op for w in sent}) > 4
    for workload in sent:
        assert pickle.loads(pickle.dumps(workload)) == workload


def test_models_on_a_cpu_are_measured_apart_and_kernels_here(monkeypatch):
    started = []
    monkeypatch.setattr(
        session.Apart, "start", lambda self, *args: started.append("apart") or Started(*args)
    )
    monkeypatch.setattr(WallClock, "prepare", FakeClock().prepare)
    for level in ("model", "kernel"):
        workload = dataclasses.replace(workload_of({OURS: lambda x: x * 2}), level=level)
        with session.measuring(WallClock(), "cpu") as measured:
            assert isinstance(measured(workload, None, 0.0)[0], Measurement)
    assert started == ["apart"]
