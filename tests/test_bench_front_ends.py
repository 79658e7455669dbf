"""What people call: ``fastbert bench``, ``pytest benchmarks``, and the page in a real browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import FakeClock
from fastbert.benchmarks import session
from fastbert.benchmarks.catalogue import workloads
from fastbert.benchmarks.results import Results
from forked import COMMAND, forked
from typer.testing import CliRunner

from fastbert.cli import app

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("--suite", "smoke", "--seconds", "0.05")
PROVIDERS = ("--provider", "fastbert", "--provider", "torch eager")
COUNT = sum(len(w.among(PROVIDERS[1::2])) for w in workloads("cpu", "smoke"))


def command(*args: str):
    return CliRunner().invoke(app, ["bench", *args])


def plain(text: str) -> str:
    return " ".join(re.sub(r"[^\x20-\x7e]", " ", text).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with the results of one run of the command."""
    folder = tmp_path_factory.mktemp("bench") / "out"
    done = forked(COMMAND, "bench", *QUICK, *PROVIDERS, "-o", str(folder), COLUMNS="160")
    assert done.returncode == 0, done.stderr[-2000:]
    for words in ("against reference", "latency/tiny/B1/S16/float32", "report.html"):
        assert words in done.stdout
    return folder


@pytest.mark.slow
def test_a_run_leaves_one_json_and_two_reports(run):
    assert {p.name for p in run.iterdir()} == {"results.json", "report.md", "report.html"}
    results = Results.load(run / "results.json")
    assert len(results.measurements) == COUNT and not results.failures
    assert results.limits["copy_gbs"] > 0 and results.settings["suite"] == "smoke"
    assert results.settings["took_seconds"] > 0
    assert "| fastbert |" in (run / "report.md").read_text()


@pytest.mark.slow
def test_compare_says_what_moved_and_can_be_a_gate(run, tmp_path):
    same = command("compare", str(run), str(run / "results.json"), "--fail-slower")
    assert same.exit_code == 0 and f"0 of {COUNT} moved" in same.output
    data = json.loads((run / "results.json").read_text())
    for m in data["measurements"]:
        if m["provider"] == "fastbert" and m["op"] == "latency":
            m["wall"] = [50 * t for t in m["wall"]]
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(data))
    moved = command("compare", str(run), str(slower))
    assert moved.exit_code == 0 and f"1 of {COUNT} moved" in moved.output
    assert "slower" in moved.output
    assert command("compare", str(run), str(slower), "--fail-slower").exit_code != 0
    assert "faster" in command("compare", str(slower), str(run)).output


@pytest.mark.slow
def test_a_report_can_be_made_anew(run, tmp_path):
    assert command("report", str(run), "-o", str(tmp_path)).exit_code == 0
    assert (tmp_path / "report.html").read_text() == (run / "report.html").read_text()


@pytest.mark.parametrize(
    "args, code, words",
    [
        (("--suite", "everything"), 2, "expected one of smoke"),
        (("--provider", "nobody"), 2, "nobody does not occur in suite quick"),
        (("--device", "tpu"), 2, "expected cpu, auto"),
        (("-o", __file__), 2, "expected a folder"),
    ],
)
def test_bad_arguments_get_an_answer_before_any_work(args, code, words):
    result = command(*args)
    assert result.exit_code == code and words in plain(result.output)


@pytest.mark.slow
def test_bad_files_get_an_answer(run, tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    for args, words in (
        ((str(tmp_path / "none"), str(run)), "no such file"),
        ((str(bad), str(run)), "not a result file"),
    ):
        result = command("compare", *args)
        assert result.exit_code != 0 and words in str(result.exception), result.output


def test_an_interrupted_run_says_where_its_results_are(tmp_path, monkeypatch):
    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "run_suite", interrupted)
    result = command("--suite", "smoke", "-o", str(tmp_path / "kept"))
    assert result.exit_code == 130 and f"is in {tmp_path}/kept" in plain(result.output)


# ---- pytest benchmarks ----


def pytest_benchmarks(*args: str, cwd: Path = ROOT, **variables: str):
    ours = ("TRITON_INTERPRET", "PYTEST_")  # a worker of xdist would be told to measure nothing
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *args],
        cwd=cwd, env={**environment, **variables}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_pytest_stores_what_was_measured(tmp_path):
    out, stored = tmp_path / "out", tmp_path / "stored.json"
    done = pytest_benchmarks(
        "benchmarks", "--suite", "smoke", "--seconds", "0.05", "--results", str(out),
        f"--benchmark-json={stored}", "-k", "softmax and not compile",
    )  # fmt: skip
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout[-2000:]
    assert "1 skipped" in done.stdout, "Liger is not installed, and that is said"
    entries = json.loads(stored.read_text())["benchmarks"]
    results = Results.load(out / "results.json")
    assert len(entries) == len(results.measurements) == 2
    for entry in entries:
        info = entry["extra_info"]
        measured = next(m for m in results.measurements if m.provider == info["provider"])
        assert entry["stats"]["median"] == pytest.approx(measured.seconds, rel=1e-3)
        assert entry["stats"]["rounds"] == len(measured.wall)
        assert entry["group"] == measured.workload and info["gbs"] > 0
        assert info["machine"]["commit"] and info["error"] <= info["allowed"]


PLUGIN = """
import os
from fakes import FakeClock
from fastbert.benchmarks import conftest
from fastbert.benchmarks.conftest import *  # noqa: F403
from fastbert.benchmarks.conftest import _bench_session  # noqa: F401

seconds = 6e-3 if os.environ.get("MADE") == "slow" else 1e-3
conftest.clock_for = lambda device: FakeClock(lambda run: seconds)
"""
CASES = """
import os
import torch, pytest
from fastbert.benchmarks.workload import Prepared, Workload, checked_against

def double(x):
    return x * 2 + (1e-3 if os.environ.get("MADE") == "wrong" else 0)

def setup(workload, device):
    x = torch.linspace(-1, 1, 64)
    check = lambda p, out: checked_against(p, [out], [x.double() * 2], [x * 2])
    return Prepared([x], {"fastbert": lambda: double}, check, None, 64)

WORKLOAD = Workload("double", "model", {"N": 64}, torch.float32, setup, ("fastbert",))

@pytest.mark.parametrize(("case", "name"), [(WORKLOAD, "fastbert")], ids=["double"])
def test_double(bench, case, name):
    bench(case, name)
"""


@pytest.mark.slow
def test_a_slow_and_a_wrong_provider_are_caught_by_the_gates(tmp_path):
    (tmp_path / "conftest.py").write_text(PLUGIN)
    (tmp_path / "test_double.py").write_text(CASES)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    options = ("--seconds", "0.1", "--benchmark-storage", str(tmp_path / "stored"))
    gate = ("--benchmark-compare", "--benchmark-compare-fail=median:50%")
    path = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    saved = pytest_benchmarks(*options, "--benchmark-save=first", cwd=tmp_path, **path)
    assert saved.returncode == 0, saved.stdout[-2000:] + saved.stderr[-2000:]
    same = pytest_benchmarks(*options, *gate, cwd=tmp_path, **path)
    assert same.returncode == 0, same.stdout[-2000:] + same.stderr[-2000:]
    slow = pytest_benchmarks(*options, *gate, cwd=tmp_path, MADE="slow", **path)
    assert slow.returncode != 0 and "Performance has regressed" in slow.stdout + slow.stderr
    wrong = pytest_benchmarks(*options, cwd=tmp_path, MADE="wrong", **path)
    assert wrong.returncode == 1
    assert "wrong result: fastbert: error 1.000e-03 is over the budget" in wrong.stdout


# ---- the page in a browser ----

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def browse(page: Path, tmp_path: Path, *flags: str) -> str:
    return subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip


PROBE = """
<script>
addEventListener('load', () => {
  const shown = [...document.querySelectorAll('figure svg')].filter(
    s => s.getBoundingClientRect().width > 300 && s.getBoundingClientRect().height > 100);
  const wide = document.documentElement.scrollWidth > innerWidth;
  document.title = JSON.stringify({
    plots: shown.length, wide, cards: document.querySelectorAll('.card').length,
    rows: document.querySelectorAll('table tr').length,
    outside: performance.getEntriesByType('resource').length,
    text: document.body.innerText.length});
});
</script>
"""


@pytest.mark.slow
def test_the_page_is_whole_in_a_browser_and_loads_nothing(tmp_path, on_torch):
    if CHROMIUM is None:
        pytest.skip("needs chromium, which .ci/run installs where it can")
    chosen = [w for w in workloads("cpu", "smoke") if w.op != "training step"]
    chosen += [w for w in workloads("cpu", "quick") if w.op == "softmax forward"]
    times = (1e-4 * i for i in range(1, 10_000))
    results = session.run_suite(
        "smoke", tmp_path, device="cpu", chosen=chosen, clock=FakeClock(lambda run: next(times)),
        providers=["fastbert", "transformers sdpa", "transformers eager", "torch eager"],
    )  # fmt: skip
    assert not results.failures
    page = tmp_path / "report.html"
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text("utf-8").replace("</body>", PROBE + "</body>"), "utf-8")
    dom = browse(probed, tmp_path, "--window-size=1200,900", "--dump-dom")
    seen = json.loads(re.search(r"<title>(.*?)</title>", dom)[1].replace("&quot;", '"'))
    assert seen["plots"] == 3 and seen["cards"] >= 3, seen
    assert seen["outside"] == 0 and not seen["wide"], seen
    assert seen["rows"] > 25 and seen["text"] > 800, seen
    shot = tmp_path / "shot.png"
    browse(page, tmp_path, "--window-size=1200,2400", f"--screenshot={shot}")
    from matplotlib import pyplot as plt

    pixels = plt.imread(shot)[..., :3]
    blue = (pixels[..., 2] > 0.7) & (pixels[..., 0] < 0.3)  # our colour, in cards and plots
    assert blue.sum() > 500 and pixels.std() > 0.05, "the page is blank"
