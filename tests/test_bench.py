"""The benchmark suite measures what it says, refuses what is wrong, and notices what got slower.

No test here depends on how fast anything is: clocks are fakes, except where only the machinery
around them is looked at.
"""

import dataclasses
import json
import math
import statistics

import pytest
import torch
from fakes import FakeClock, FakeCuda, FakeTime, workload_of
from fastbert.benchmarks import limits, session
from fastbert.benchmarks.catalogue import SUITES, workloads
from fastbert.benchmarks.encoders import COMPILED, Encoders
from fastbert.benchmarks.limits import Pace, measure_limits
from fastbert.benchmarks.report import markdown, page
from fastbert.benchmarks.results import (
    Check,
    Measurement,
    NotMeasured,
    Results,
    compare,
    machine_facts,
    quantiles,
)
from fastbert.benchmarks.shapes import LENGTHS, draw_lengths, fill_of
from fastbert.benchmarks.targets import STATUSES, TARGETS, Judged, Target, judge
from fastbert.benchmarks.timing import CudaClock, NoClock, Sample, WallClock, interleave
from fastbert.benchmarks.workload import OURS, Unavailable, measure

import fastbert
from fastbert import frozen
from fastbert.ops import onednn


@pytest.fixture
def facts():
    return {**machine_facts("cpu"), "date": "2026-01-01"}


def measured(provider=OURS, times=(1.0, 1.1, 0.9), workload="w", **changes) -> Measurement:
    return Measurement(
        **{
            "workload": workload, "op": workload, "level": "model", "params": {"B": 1},
            "dtype": "float32", "provider": provider, "reference": "peer",
            "check": Check(True, 1e-7, 1e-6, "fp64"), "wall": list(times), "device": None,
            "tokens": 10, "flops": 1e9, "bytes": 1e6, "peak_memory": None, "how": "fake",
        }
        | changes
    )  # fmt: skip


# ---- the gate: no number without a check ----


def test_a_wrong_provider_fails_and_is_never_timed():
    timed = []
    clock = FakeClock(lambda run: timed.append(run) or 1e-3)
    entries = measure(
        workload_of({OURS: lambda x: x * 2 + 1e-3, "peer": lambda x: x * 2}), clock, "cpu"
    )
    ours, peer = entries
    assert isinstance(ours, NotMeasured) and ours.failed and "wrong result" in ours.reason
    assert isinstance(peer, Measurement) and peer.check.passed
    assert clock.prepared == 1, "the wrong one was given to the clock"


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e9])
def test_nan_and_large_errors_are_wrong_for_peers_too(broken):
    bad = workload_of({"peer": lambda x: torch.full_like(x, broken)})
    (entry,) = measure(bad, FakeClock(), "cpu")
    assert isinstance(entry, NotMeasured) and entry.failed


def test_a_shape_that_differs_is_wrong():
    (entry,) = measure(workload_of({OURS: lambda x: x[:1] * 2}), FakeClock(), "cpu")
    assert entry.failed and "shapes differ" in entry.reason


def test_unavailable_and_broken_peers_are_said_and_do_not_stop_the_rest():
    def not_here(x):
        raise Unavailable("peer is not installed")

    def breaks(x):
        raise RuntimeError("peer\nexploded")

    providers = {"absent": not_here, "broken": breaks, OURS: lambda x: x * 2}
    absent, broken, ours = measure(workload_of(providers), FakeClock(), "cpu")
    assert absent.reason == "peer is not installed" and not absent.failed
    assert broken.reason == "RuntimeError: peer exploded" and not broken.failed
    assert isinstance(ours, Measurement)
    (ours,) = measure(workload_of({OURS: breaks}), FakeClock(), "cpu")
    assert ours.failed, "our own exception is a failure"


def test_a_measurement_needs_a_green_check(tmp_path, facts):
    for check in (Check(False, 1.0, 1e-6, "fp64"), None, True):
        with pytest.raises(ValueError, match="needs a correctness check that passed"):
            measured(check=check)
    for times in ([], [0.0], [float("nan")]):
        with pytest.raises(ValueError, match="expected positive times"):
            measured(times=times)
    path = tmp_path / "r.json"
    Results(facts, measurements=[measured()]).save(path)
    tampered = json.loads(path.read_text())
    tampered["measurements"][0]["check"]["passed"] = False
    path.write_text(json.dumps(tampered))
    with pytest.raises(ValueError, match=r"not a result file.*needs a correctness check"):
        Results.load(path)


# ---- clocks ----


def test_samples_are_taken_in_turn_and_in_another_order_each_round():
    order = []

    def call(name):
        return lambda: order.append(name) or Sample(1e-6)

    samples = interleave({n: call(n) for n in "abcde"}, seconds=0.0, max_rounds=9)
    assert {len(s) for s in samples.values()} == {5}
    rounds = [order[i : i + 5] for i in range(0, 25, 5)]
    assert all(sorted(r) == list("abcde") for r in rounds)
    before = {n: {r[r.index(n) - 1] for r in rounds if r[0] != n} for n in "abcde"}
    assert all(len(names) > 1 for names in before.values()), "always in the wake of the same one"


def test_the_wall_clock_repeats_short_calls_and_rotates_inputs(monkeypatch):
    clock = FakeTime()
    clock.install(monkeypatch)
    seen = []
    sample = WallClock().prepare(lambda x: seen.append(x) or clock.sleep(2**-17), ["a", "b"])
    warm = len(seen)
    assert sample().wall == pytest.approx(2**-17)
    assert len(seen) - warm == 1 + math.ceil(2e-3 * 2**17), "one after the pause, then 2 ms"
    assert seen[warm:][:4] == ["a", "b", "a", "b"]
    slow = WallClock().prepare(lambda x: seen.append(x) or clock.sleep(0.12), ["c"])
    assert slow().wall == pytest.approx(0.12)
    assert seen.count("c") == 2, "slow calls are not repeated for nothing"


@pytest.mark.parametrize(
    ("each", "host", "capturable", "graphs"),
    [
        (5e-6, 1e-6, True, 1),  # short: a graph
        (5e-6, 50e-6, True, 1),  # the host needs ten times as long: a graph has no gaps
        (5e-6, 50e-6, False, 0),  # cannot be captured: queued behind a spin that is long enough
        (5e-3, 1e-6, True, 0),
        (1e-3, 8e-3, True, 0),  # a model that is bound by its host
    ],
)
def test_the_gpu_clock_measures_the_device_and_not_the_host(
    each, host, capturable, graphs, monkeypatch
):
    cuda = FakeCuda(each, host=host, capturable=capturable)
    cuda.install(monkeypatch)
    sample = CudaClock().prepare(cuda.kernel, ["a", "b", "c"])()
    assert sample.device == pytest.approx(each, rel=1e-6)
    assert sample.wall == pytest.approx(host + each, rel=1e-6)
    assert cuda.graphs == graphs
    assert set(cuda.inputs) == {"a", "b", "c"}, "the cache would be warm"


def test_a_faster_call_is_found_to_be_faster(monkeypatch):
    clock = FakeTime()
    clock.install(monkeypatch)
    runs = {"short": lambda _: clock.sleep(0.004), "long": lambda _: clock.sleep(0.02)}
    calls = {name: WallClock().prepare(run, [None]) for name, run in runs.items()}
    samples = interleave(calls, seconds=0.0)
    times = {name: statistics.median(s.wall for s in taken) for name, taken in samples.items()}
    assert times == pytest.approx({"short": 0.004, "long": 0.02})


def test_nobody_is_timed_while_the_threads_of_another_spin(monkeypatch):
    """ONNX Runtime's do for 32 ms, and have one of two cores then."""
    clock = FakeTime()
    clock.install(monkeypatch)
    spinning = [-math.inf]

    def spins(_):
        clock.sleep(0.003)
        spinning[0] = clock.now + 0.032

    runs = {
        "spins": spins,
        "other": lambda _: clock.sleep(0.008 if clock.now < spinning[0] else 0.004),
    }
    samples = interleave(
        {n: WallClock().prepare(run, [None]) for n, run in runs.items()}, seconds=1
    )
    assert {round(s.wall, 6) for s in samples["other"]} == {0.004}


# ---- workloads ----


def test_length_distributions_are_what_they_are_called():
    for name in LENGTHS:
        lengths = draw_lengths(name, 512, 384)
        assert lengths[0] == 384 and min(lengths) >= 1 and max(lengths) == 384
        assert lengths == draw_lengths(name, 512, 384)
    fills = {name: fill_of(draw_lengths(name, 512, 384)) for name in LENGTHS}
    assert fills["fixed"] == 1.0
    assert abs(fills["uniform"] - 0.5) < 0.03
    assert abs(fills["squad"] - 0.45) < 0.03
    assert abs(fills["short"] - 0.2) < 0.03
    with pytest.raises(ValueError, match="expected one of fixed, uniform"):
        draw_lengths("gaussian", 2, 8)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_suite_has_workloads_with_names_of_their_own(device):
    for suite in SUITES:
        ids = [w.id for w in workloads(device, suite)]
        assert ids and len(set(ids)) == len(ids)
        assert all(w.reference in w.providers for w in workloads(device, suite))
    with pytest.raises(ValueError, match="suite: expected one of smoke"):
        workloads(device, "everything")


def test_every_target_of_this_project_can_be_measured():
    """Each row finds its workloads in the catalogue, given made-up times for all of them."""
    for kind in ("cpu", "cuda"):
        results = Results({**machine_facts("cpu"), "kind": kind}, limits={"copy_gbs": 4000.0})
        for w in workloads(kind, "targets"):
            for i, provider in enumerate(w.providers):
                results.add(
                    measured(
                        provider, [1e-3 * (i + 1)] * 3, w.id, op=w.op, params=w.params,
                        level=w.level, reference=w.reference, peak_memory=100 * (i + 1),
                        dtype=str(w.dtype).removeprefix("torch."), device=[1e-3 * (i + 1)] * 3,
                    )
                )  # fmt: skip
        missing = [j.target.workload for j in judge(results) if j.value is None]
        assert missing == ([] if kind == "cpu" else ["attention dropout"])  # no workload yet


def test_targets_are_judged_by_mark_and_goal():
    def status(value, mark, goal, higher=True):
        return Judged(Target("cpu", "w", "f", None, mark, goal, higher=higher), value).status

    assert status(None, 1, 2) == "not measured"
    assert [status(v, 1.5, 2.0) for v in (1.4, 1.5, 1.99, 2.0)] == [
        "below", "between", "between", "pass",
    ]  # fmt: skip
    assert [status(v, 0.4, 0.3, higher=False) for v in (0.5, 0.35, 0.3)] == [
        "below", "between", "pass",
    ]  # fmt: skip
    assert status(0.9, None, 1.0) == "between" and status(380, 375, None) == "pass"
    assert status(370, 375, None) == "below"
    for target in TARGETS:
        if target.mark is not None and target.goal is not None:
            assert (target.goal >= target.mark) == target.higher or target.goal == target.mark
    assert set(STATUSES) == {"pass", "between", "below", "not measured"}


@pytest.mark.slow
def test_the_smoke_suite_runs_with_every_provider(tmp_path, on_torch, monkeypatch):
    """Every operation, every model workload and every peer that is installed, checked for real;
    compiled by torch, which takes seconds for each, a model and one operation."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # before each workload, for the clock's sake
    chosen = [
        dataclasses.replace(w, providers=tuple(n for n in w.providers if n != COMPILED))
        if w.level == "kernel" and w.op != "attention backward" else w
        for w in workloads("cpu", "smoke")
    ]  # fmt: skip
    results = session.run_suite("smoke", tmp_path, device="cpu", chosen=chosen, clock=FakeClock())
    assert not results.failures
    providers = {m.provider for m in results.measurements}
    known = {OURS, "ONNX Runtime", "OpenVINO", "nn.TransformerEncoder", COMPILED}
    assert known <= providers, results.not_measured
    ops = {m.op for m in results.measurements if m.provider == OURS}
    assert ops == {w.op for w in workloads("cpu", "smoke")}
    for m in results.measurements:
        assert m.check.error <= m.check.budget and m.tokens > 0
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "report.md", "report.html"}


@pytest.mark.slow
def test_kernels_are_checked_but_never_timed_under_the_interpreter(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted here")
    chosen = [w for w in workloads("cpu", "smoke") if w.level == "kernel"]
    with fastbert.backend("triton"):
        results = session.run_suite(
            "smoke", tmp_path, device="cpu", chosen=chosen, providers=[OURS]
        )
    assert isinstance(session.clock_for("cpu"), NoClock)
    assert not results.measurements and not results.failures and not results.limits
    assert {n.workload for n in results.not_measured} == {w.id for w in chosen}
    assert all("its result is right" in n.reason for n in results.not_measured)


@pytest.mark.slow
def test_a_wrong_kernel_is_found_under_the_interpreter(tmp_path, monkeypatch):
    from fastbert.benchmarks import kernel_workloads

    op = kernel_workloads.OPS["softmax"]
    wrong = dataclasses.replace(op, ours=lambda x: op.ours(x) * 1.001)
    monkeypatch.setitem(kernel_workloads.OPS, "softmax", wrong)
    chosen = [w for w in workloads("cpu", "smoke") if w.op.startswith("softmax")]
    with fastbert.backend("triton"):
        results = session.run_suite("smoke", tmp_path, device="cpu", chosen=chosen, clock=NoClock())
    assert [n.provider for n in results.failures] == [OURS]


# ---- results ----


def test_a_result_file_round_trips_and_is_written_whole(tmp_path, facts):
    path = tmp_path / "r.json"
    results = Results(facts, {"suite": "x"}, {"copy_gbs": 30.0}, [measured()])
    results.add(NotMeasured("w", "peer", "is not installed"))
    results.save(path)
    loaded = Results.load(path)
    assert loaded == results and loaded.measurements[0].params == {"B": 1}
    assert len(path.read_text().splitlines()) < 50, "one measurement a line"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    for text in ("", "{}", '{"schema": 99}', "[1]", '{"schema": 1, "machine": {}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="not a result file of fastbert bench"):
            Results.load(path)


def test_a_result_says_what_it_ran_on():
    facts = machine_facts("cpu")
    assert facts["torch"] == torch.__version__ and facts["fastbert"] == fastbert.__version__
    assert facts["device"] and facts["threads"] >= 1 and facts["date"] >= "2026"
    assert isinstance(facts["dirty"], bool) and len(facts["commit"]) == 40


def test_ratios_come_from_rounds_and_not_from_medians():
    """A machine that slows down in the middle of a run moves both providers, not their ratio."""
    drift = [1.0, 1.0, 3.0, 3.0, 3.0]
    ours, peer = measured(times=drift), measured("peer", [2 * t for t in drift])
    assert ours.speedup_over(peer) == pytest.approx(2.0)
    assert quantiles([1.0, 2.0, 3.0, 4.0, 5.0])[1] == 3.0 and quantiles([7.0]) == (7.0, 7.0, 7.0)


def noisy(scale, seed, spread=0.02, count=20):
    generator = torch.Generator().manual_seed(seed)
    return (scale * (1 + spread * torch.randn(count, generator=generator))).abs().tolist()


def test_compare_finds_what_moved_and_nothing_else(facts):
    def run(ours, peer, seed):
        return Results(
            facts, measurements=[measured(times=noisy(ours, seed)),
                                 measured("peer", noisy(peer, seed + 1))],
        )  # fmt: skip

    old = run(1.0, 2.0, 0)
    verdicts = {c.provider: c for c in compare(old, run(1.0, 2.0, 10))}
    assert [c.verdict for c in verdicts.values()] == ["same", "same"]
    assert verdicts[OURS].relative_to == "peer" and verdicts["peer"].relative_to is None
    changed = {c.provider: c.verdict for c in compare(old, run(1.25, 2.0, 10))}
    assert changed == {OURS: "slower", "peer": "same"}
    assert {c.provider: c.verdict for c in compare(old, run(0.8, 2.0, 10))}[OURS] == "faster"
    # the whole machine at half its speed: the peer says so, fastbert did not change
    half = {c.provider: c.verdict for c in compare(old, run(2.0, 4.0, 10))}
    assert half == {OURS: "same", "peer": "slower"}
    assert compare(old, Results(facts, measurements=[measured(workload="other")])) == []


# ---- a run ----


def test_a_run_keeps_what_it_has_when_time_is_up_or_it_is_interrupted(tmp_path):
    chosen = [
        dataclasses.replace(workload_of({OURS: lambda x: x * 2}), params={"N": i}) for i in range(4)
    ]
    results = session.run_suite(
        "smoke", tmp_path / "a", device="cpu", clock=FakeClock(), chosen=chosen, time_budget=-1.0
    )
    assert not results.measurements
    assert {n.reason for n in results.not_measured} == {session.OUT_OF_TIME}

    def interrupt(i, count, workload, entries):
        if i == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.run_suite(
            "smoke", tmp_path / "b", device="cpu", clock=FakeClock(), chosen=chosen,
            progress=interrupt,
        )  # fmt: skip
    assert len(Results.load(tmp_path / "b" / "results.json").measurements) == 2
    assert (tmp_path / "b" / "report.html").exists()


# ---- reports ----


def test_the_share_of_the_limit_takes_the_scarcer_of_two(facts):
    results = Results(facts, {}, {"copy_gbs": 10.0, "matmul_tflops_float32": 1.0})
    copying = measured(times=[1e-3], flops=0.0, bytes=5e6)  # half a millisecond of copying
    assert results.share_of_limit(copying) == pytest.approx(0.5)
    multiplying = measured(times=[1e-3], flops=8e8, bytes=1e3)
    assert results.share_of_limit(multiplying) == pytest.approx(0.8)
    assert results.share_of_limit(measured(bytes=None)) is None
    assert Results(facts).share_of_limit(copying) is None


def test_no_share_is_above_the_limit(facts):
    """It is in a cache, or the limit is wrong, and either is said in place of a figure."""
    results = Results(facts, {}, {"copy_gbs": 10.0, "matmul_tflops_float32": 1.0})
    cached = measured(times=[1e-3], flops=0.0, bytes=2e7)
    impossible = measured(times=[1e-3], flops=2e9, bytes=1e3, workload="v")
    for m, why in ((cached, "in cache"), (impossible, "above the limit measured")):
        assert results.share_of_limit(m) is None and results.beyond_limit(m) == why
        results.add(m)
        assert f"| {why} |" in markdown(results)
    noise = measured(times=[1e-3], flops=1.01e9, bytes=1e3)
    assert results.share_of_limit(noise) == 1.0 and results.beyond_limit(noise) is None


def test_the_matrix_limit_is_that_of_the_fastest_route(monkeypatch):
    """On some CPUs the library behind ``@`` takes twice as long as the one that models use."""
    routes = {"slow": lambda a: a, "fast": lambda a: a}
    monkeypatch.setattr(limits, "_products", lambda b: routes)
    seconds = {routes["slow"]: 2e-3, routes["fast"]: 1e-3}
    found = measure_limits(FakeClock(lambda run: seconds.get(run, 1e-2)), "cpu")
    assert found["matmul_tflops_float32"] == pytest.approx(2 * 1024**3 / 1e-3 / 1e12, rel=1e-3)
    monkeypatch.undo()
    a, b = torch.randn(2, 16, 16)
    products = limits._products(b)
    assert len(products) == 1 + onednn.available()
    for product in products.values():
        torch.testing.assert_close(product(a), a @ b, atol=1e-5, rtol=0)
    assert list(limits._products(b.bfloat16())) == ["matmul"]


# ---- a machine that others use too ----


def test_the_pace_is_that_of_a_fixed_product_against_its_best():
    taken = iter([2e-3] * 15 + [3e-3] * 15 + [1e-3] + [2e-3] * 14 + [2e-3] * 15)
    pace = Pace(FakeClock(lambda run: next(taken)), "cpu")
    assert [pace(), pace(), pace()] == [1.5, 2.0, 2.0]
    assert Pace(FakeClock(), "cuda")() is None and Pace(NoClock(), "cpu")() is None


@pytest.mark.parametrize(
    ("paces", "rounds", "kept", "disturbed"),
    [
        ([1.0, 1.1], 1, 1.1, False),
        ([1.0, 1.5, 1.1], 2, 1.5, True),  # the second began while it was disturbed
        ([1.6, 1.0, 1.0], 2, 1.0, False),
        ([1.0, 1.9, 1.2], 2, 1.9, True),
        ([None, None], 1, None, False),
    ],
)
def test_what_ran_while_the_machine_was_disturbed_is_timed_again_and_marked(
    facts, paces, rounds, kept, disturbed
):
    asked, timed = iter(paces), []
    clock = FakeClock(lambda run: timed.append(run) or 1e-3 * (1 + len(timed) // 6))
    (entry,) = measure(
        workload_of({OURS: lambda x: x * 2}), clock, "cpu", seconds=0.0, pace=lambda: next(asked)
    )
    assert len(timed) == 5 * rounds
    assert (entry.pace, entry.disturbed) == (kept, disturbed)
    report = markdown(Results(facts, measurements=[entry]))
    assert ("Disturbed" in report) == disturbed


def test_reports_show_every_measurement_and_what_is_missing(facts):
    results = Results(
        facts, {"clock": "fake"}, {"copy_gbs": 30.0, "matmul_tflops_float32": 0.2},
        [measured(), measured("peer", (2.0, 2.1, 1.9))],
    )  # fmt: skip
    results.add(NotMeasured("w", "x<y", "is not installed"))
    results.add(NotMeasured("w", "bad", "wrong result: off by 1", failed=True))
    text, html = markdown(results), page(results)
    for report in (text, html):
        assert "2.00x" in report and "is not installed" in report and "Wrong results" in report
        assert "30 GB/s" in report and facts["commit"][:12] in report
    assert "x&lt;y" in html and "x<y" not in html
    gpu = Results({**facts, "kind": "cuda", "device": "NVIDIA H200"}, {}, {}, [])
    assert "not measured" in markdown(gpu) and "TFLOP/s |" not in markdown(gpu)


@pytest.mark.skipif(not onednn.available(), reason="needs torch's operators of oneDNN")
def test_the_time_of_one_text_is_parted_behind_a_check(monkeypatch, capsys, on_torch):
    from fastbert.benchmarks import short_texts

    encode = frozen.encode_on_onednn
    monkeypatch.setattr("sys.argv", ["short_texts", "--model", "tiny", "--rounds", "3"])
    short_texts.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in rows if row and "tiny" in row[0]]
    assert [row[0].strip() for row in rows] == [f"tiny S{n}" for n in (16, 32, 64, 128)]
    assert frozen.encode_on_onednn is encode
    parts = short_texts.parts_of(Encoders("tiny", torch.float32, "cpu"), 16, rounds=3)
    assert 0 < parts.layers < parts.call and 0 < parts.around < parts.call and parts.alone > 0
    monkeypatch.setattr(frozen, "encode_on_onednn", lambda *args: encode(*args).flip(-1))
    with pytest.raises(AssertionError, match="not transformers' result"):
        short_texts.parts_of(Encoders("tiny", torch.float32, "cpu"), 16, rounds=3)
