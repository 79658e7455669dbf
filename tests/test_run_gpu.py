"""The script for a GPU machine keeps to its time and loses no result, whatever its steps do.

The steps here are small programs that pass, fail, hang, ignore interrupts or lose their GPU.
"""

import dataclasses
import re
import signal
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from fakes import FakeClock, FakeTime, workload_of
from fastbert.benchmarks import gpu_steps, run_gpu
from fastbert.benchmarks.results import Measurement, NotMeasured, Results, machine_facts
from fastbert.benchmarks.run_gpu import Step, run_all, run_step
from fastbert.benchmarks.timing import CudaClock
from fastbert.benchmarks.workload import OURS, measure


def program(text: str) -> tuple[str, ...]:
    return sys.executable, "-c", text


# These say by a file when they have come so far that something may happen to them.
DEAF = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, lambda *a: (print("not now", flush=True), Path("{}/2").touch()))
Path("{}/1").touch()
while True: time.sleep(60)
"""
KEEPS = """
import time
from pathlib import Path
try:
    Path("{}/1").touch()
    while True: time.sleep(60)
except KeyboardInterrupt:
    print("kept what there was")
"""


@pytest.fixture
def patient(monkeypatch, tmp_path):
    """Time is up for a process when it has made another file here, however long that takes."""
    seen = []

    def wait(process, seconds):
        end = time.monotonic() + 120  # a fault may not hang
        while process.poll() is None:
            assert time.monotonic() < end, "neither ended nor made its file"
            if (tmp_path / str(len(seen) + 1)).exists():
                seen.append(process)
                return None
            time.sleep(0.01)
        return process.returncode

    monkeypatch.setattr(run_gpu, "_wait", wait)
    return tmp_path


def test_processes_of_a_step_run_beside_each_other_and_all_they_say_is_kept():
    step = Step("s", (program("print('one')"), program("print('two'); raise SystemExit(3)")), 30)
    codes, text = run_step(step, 30)
    assert codes == [0, 3] and "one" in text and "two" in text
    assert step.verdict(codes, text) == "FAILED, exit codes [3]"


@pytest.mark.parametrize("text, said", [(DEAF, "not now"), (KEEPS, "kept what there was")])
def test_a_step_that_hangs_is_ended_and_has_not_passed(text, said, patient):
    commands = program(text.replace("{}", str(patient))), program("print('fine')")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as if begun in the background
    try:
        codes, output = run_step(Step("s", commands, 60), 60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert codes == [None, 0] and said in output and "fine" in output
    assert run_gpu.verdict_of(codes) == "unfinished"


def test_a_process_is_waited_for_so_long_and_no_longer():
    hangs = subprocess.Popen(program("import time; time.sleep(600)"))
    assert run_gpu._wait(hangs, 0.1) is None
    hangs.kill()
    assert run_gpu._wait(hangs, 600) == -9


def test_what_an_ended_step_started_is_ended_too(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time\nwhile True: open({str(mark)!r}, 'a').write('.'); time.sleep(0.05)"
    text = f"""
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {child!r}])
while not os.path.exists({str(mark)!r}): time.sleep(0.05)
"""
    assert run_step(Step("s", (program(text),), 600), 600)[0] == [0]
    time.sleep(0.3)
    size = mark.stat().st_size
    time.sleep(0.5)
    assert mark.stat().st_size == size


def test_a_run_goes_on_after_a_failure_and_stops_in_time(tmp_path, capsys, monkeypatch):
    fake, needs = FakeTime(), {"crashes": 5, "fine": 40, "hangs": 1000, "late": 1}
    granted = {}

    def run(step, seconds):
        granted[step.name] = seconds
        fake.sleep(min(seconds, needs[step.name]))
        code = None if seconds < needs[step.name] else -6 if step.name == "crashes" else 0
        return [code], f"all that {step.name} says"

    monkeypatch.setattr(run_gpu, "time", fake)
    monkeypatch.setattr(run_gpu, "run_step", run)
    spare = run_gpu._FOR_REPORTS + run_gpu._GRACE
    todo = [Step(name, (), 60) for name in needs]
    verdicts = run_all(todo, tmp_path, minutes=(spare + 5 + 40 + 50) / 60)
    assert verdicts["crashes"].startswith("FAILED") and verdicts["fine"] == "passed"
    assert verdicts["hangs"] == "unfinished" and verdicts["late"].startswith("not started")
    assert granted == {"crashes": 60, "fine": 60, "hangs": pytest.approx(50)}
    log = (tmp_path / "log.txt").read_text()
    assert "all that fine says" in log and "late" not in log
    assert "hangs: unfinished" in capsys.readouterr().out


def test_a_machine_that_lacks_something_stops_the_run(tmp_path, capsys):
    todo = [
        Step("preflight", (program("raise SystemExit('Triton needs Python.h')"),), 20, needed=True),
        Step("next", (program("print('never')"),), 20),
    ]
    assert list(run_all(todo, tmp_path, minutes=2)) == ["preflight"]
    assert "Triton needs Python.h" in capsys.readouterr().out


def test_every_wrong_workload_and_failed_test_is_named():
    check, tests = (
        next(s for s in run_gpu.steps(run_gpu.ROOT, 2) if s.name == name)
        for name in ("check", "tests")
    )
    text = (
        "softmax/M8: error 1.00e-09, budget 2.00e-09 [0.1 s]\n"
        "layer norm/M8/N16: WRONG: off by 1 [0.2 s]\nchecked 2 workloads, 1 wrong\n"
    )
    assert check.verdict([1, 0], text).splitlines() == [
        "FAILED, exit codes [1]: 2 workloads, 1 wrong", "      layer norm/M8/N16",
    ]  # fmt: skip
    text = "[gw1] [ 5%] FAILED tests/test_a.py::test_x[1] \n...\n= 1 failed, 3 passed in 2 s =\n"
    assert tests.verdict([1], text).splitlines() == [
        "FAILED, exit codes [1]: 1 failed, 3 passed in 2 s", "      tests/test_a.py::test_x[1]",
    ]  # fmt: skip
    assert tests.verdict([None], "").startswith("unfinished")


def test_steps_name_what_there_is_and_their_time_is_accounted_for():
    todo = run_gpu.steps(run_gpu.ROOT, 14)
    (pytest_command,) = next(s for s in todo if s.name == "tests").commands
    paths = [a for a in pytest_command if a.startswith("tests/")]
    assert len(paths) > 8 and all((run_gpu.ROOT / path).is_file() for path in paths)
    measured = [c[c.index("measure") + 1] for s in todo for c in s.commands if "measure" in c]
    assert measured == list(gpu_steps.GROUPS)
    certain = [s for s in todo if not s.name.startswith("compiled")]
    assert sum(s.seconds for s in certain) <= 9 * 60 - 15
    for name, group in gpu_steps.GROUPS.items():
        workloads, providers = group()
        assert workloads and OURS in providers, name
        assert all("targets" in w.suites for w in workloads)


def test_the_check_has_every_operation_both_ways_in_both_dtypes_and_fits_a_card():
    found = [w.id for w in gpu_steps._checked()]
    assert len(found) == len(set(found)) and len(found) > 100
    assert found[0].startswith("attention backward")
    for op in ("attention", "attention, bias", "layer norm", "softmax", "embedding", "linear"):
        for dtype in ("bfloat16", "float16"):
            assert any(w.startswith(f"{op}") and w.endswith(dtype) for w in found), (op, dtype)
    for size in (32, 64, 128):
        assert any(re.match(rf"attention backward/.*S64/.*D{size}/", w) for w in found), size


def test_a_check_compares_with_fp64_and_the_second_run_with_the_first(monkeypatch, capsys):
    calls = iter(range(100))
    names = {"__name__": "fastbert.kernels.x", "torch": torch}
    todo = [
        workload_of({OURS: lambda x: x * 2}, "right"),
        workload_of({OURS: lambda x: eval("torch.empty_like(x)", names, {"x": x})}, "unwritten"),
        workload_of({OURS: lambda x: x * 2.1}, "off"),
        workload_of({OURS: lambda x: x * 2 + 2e-7 * (next(calls) % 2)}, "unsteady"),
        workload_of({OURS: lambda x: 1 / 0}, "breaks"),
    ]
    monkeypatch.setattr(gpu_steps, "_checked", lambda: todo)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    left = [weakref.proxy(torch.nn.Identity())]  # of nothing, as others leave in a process
    assert gpu_steps.check(0, 1) == 4
    del left
    right, unwritten, off, unsteady, breaks, loaded, _ = capsys.readouterr().out.splitlines()
    assert "WRONG: fastbert: 64 of 64 values are not finite" in unwritten
    assert "error" in right and "WRONG: fastbert: error" in off
    assert "WRONG: a second run gave other bits" in unsteady
    assert "WRONG: ZeroDivisionError" in breaks
    assert loaded == "0 kernels loaded, at most 0 registers, 0 with a stack"


def test_a_kernel_that_has_a_stack_on_the_device_is_named():
    clean, spilling = (
        SimpleNamespace(
            name=name, n_regs=registers, n_spills=words, metadata=SimpleNamespace(num_warps=4)
        )
        for name, registers, words in (("_softmax", 40, 0), ("_attention", 255, 12))
    )
    first, *others = gpu_steps.resources_of([clean, spilling]).splitlines()
    assert first == "2 kernels loaded, at most 255 registers, 1 with a stack"
    assert others == ["    _attention, 4 warps: 255 registers, 48 bytes of stack"]


def test_bits_are_compared_not_values():
    nan, zero = torch.tensor([float("nan")]), torch.zeros(1)
    assert gpu_steps.same_bits(nan, nan.clone()) and gpu_steps.same_bits([zero, nan], [zero, nan])
    assert not gpu_steps.same_bits(zero, -zero)


def test_results_of_the_groups_become_one_file_with_the_later_one_in_the_right(tmp_path, capsys):
    facts = {**machine_facts("cpu"), "kind": "cuda", "device": "NVIDIA H100", "date": "2026-01-01"}
    providers = {OURS: lambda x: x * 2, "peer": lambda x: x * 2}
    (first, peer), (again, _) = (
        measure(workload_of(providers), FakeClock(lambda run, s=s: s), "cpu") for s in (1.0, 2.0)
    )
    alone = dataclasses.replace(first, workload="alone", op="alone")
    wrong = NotMeasured("w", OURS, "wrong result: off", failed=True)
    parts = {
        "models": Results(facts, {"suite": "a"}, {"copy_gbs": 1.0}, [first, peer, alone]),
        "compiled-latency": Results(facts, {"suite": "b"}, {"copy_gbs": 2.0}, [again], [wrong]),
    }
    for name, part in parts.items():
        (tmp_path / name).mkdir()
        part.save(tmp_path / name / "results.json")
    assert run_gpu.write_results(tmp_path, tmp_path, {"check": "passed: 3 workloads"})
    merged = Results.load(tmp_path / "results.json")
    assert [m.wall[0] for m in merged.measurements] == [1.0, 2.0], "peer's is of another run"
    assert merged.limits == {"copy_gbs": 2.0} and merged.failures == [wrong]
    assert merged.settings["verdicts"] == {"check": "passed: 3 workloads"}
    assert "wrong result: off" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()


def test_a_workload_whose_setup_breaks_does_not_stop_the_next():
    def setup(workload, device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    broken = dataclasses.replace(workload_of({OURS: None, "peer": None}), setup=setup)
    ours, peer = measure(broken, FakeClock(), "cpu")
    assert ours.failed and "its setup: RuntimeError: CUDA error" in ours.reason
    assert not peer.failed
    (fine,) = measure(workload_of({OURS: lambda x: x * 2}), FakeClock(), "cpu")
    assert isinstance(fine, Measurement)


def test_a_failed_capture_gives_the_stream_back(monkeypatch):
    current = ["ours"]

    class Capture:
        def __init__(self, graph, stream):
            assert stream == "ours"

        def __enter__(self):
            current[0] = "capturing"

        def __exit__(self, *exc):  # as torch's: it raises before it gives the stream back
            raise RuntimeError("capture_end failed")

    fake = {
        "CUDAGraph": object, "graph": Capture, "synchronize": lambda: None,
        "current_stream": lambda: current[0], "set_stream": lambda s: current.__setitem__(0, s),
    }  # fmt: skip
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert CudaClock._capture(lambda: None) is None
    assert current == ["ours"]


def test_the_script_needs_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run_gpu.py", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run_gpu.main()
    assert "expected a machine with a GPU" in capsys.readouterr().err
