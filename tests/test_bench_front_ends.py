"""What people call: ``fastbert bench``, ``pytest benchmarks``, and the page in a real browser."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fastbert.benchmarks import session
from fastbert.benchmarks.catalogue import workloads
from fastbert.benchmarks.results import Results
from forked import COMMAND, forked
from typer.testing import CliRunner

from fastbert.cli import app

ROOT = Path(__file__).resolve().parents[1]
RECORDED = max((ROOT / "benchmarks/results").glob("cpu-*.json"))
QUICK = ("--suite", "smoke", "--seconds", "0.05")
NAMES = ("fastbert", "torch eager")
PROVIDERS = [part for name in NAMES for part in ("--provider", name)]
CHOSEN = ("--workload", "softmax", "--workload", "latency/tiny")
COUNT = sum(
    len(w.among(NAMES))
    for w in workloads("cpu", "smoke")
    if any(part in w.id for part in CHOSEN[1::2])
)


def command(*args: str):
    return CliRunner().invoke(app, ["bench", *args])


def plain(text: str) -> str:
    return " ".join(re.sub(r"[^\x20-\x7e]", " ", text).split())


@pytest.mark.slow
def test_a_run_leaves_one_json_and_two_reports(tmp_path):
    folder = tmp_path / "out"
    arguments = (*QUICK, *PROVIDERS, *CHOSEN, "-o", str(folder))
    done = forked(COMMAND, "bench", *arguments, COLUMNS="160")
    assert done.returncode == 0, done.stderr[-2000:]
    for words in ("against reference", "latency/tiny/B1/S16/float32", "report.html"):
        assert words in done.stdout
    assert {p.name for p in folder.iterdir()} == {"results.json", "report.md", "report.html"}
    results = Results.load(folder / "results.json")
    assert len(results.measurements) == COUNT and not results.failures
    assert results.limits["copy_gbs"] > 0 and results.settings["suite"] == "smoke"
    assert results.settings["took_seconds"] > 0
    assert "| fastbert |" in (folder / "report.md").read_text()
    assert command("report", str(folder), "-o", str(tmp_path)).exit_code == 0
    assert (tmp_path / "report.html").read_text() == (folder / "report.html").read_text()


def test_compare_says_what_moved_and_can_be_a_gate(tmp_path):
    data = json.loads(RECORDED.read_text())
    count, ours = len(data["measurements"]), 0
    (tmp_path / "results.json").write_text(json.dumps(data))
    same = command("compare", str(RECORDED), str(tmp_path), "--fail-slower")
    assert same.exit_code == 0 and f"0 of {count} moved" in same.output
    for m in data["measurements"]:
        if m["provider"] == "fastbert" and m["op"] == "latency":
            m["wall"] = [50 * t for t in m["wall"]]
            ours += 1
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(data))
    moved = command("compare", str(RECORDED), str(slower))
    assert ours and moved.exit_code == 0 and f"{ours} of {count} moved" in moved.output
    assert "slower" in moved.output
    assert command("compare", str(RECORDED), str(slower), "--fail-slower").exit_code != 0
    assert "faster" in command("compare", str(slower), str(RECORDED)).output


@pytest.mark.parametrize(
    "args, code, words",
    [
        (("--suite", "everything"), 2, "expected one of smoke"),
        (("--provider", "nobody"), 2, "nobody does not occur there; expected some of"),
        (("--workload", "soft", "--provider", "ONNX Runtime"), 2, "does not occur there"),
        (("--workload", "a", "--workload", "@", "--suite", "none"), 2, "expected one of smoke"),
        (("--workload", "@", "--workload", "!"), 2, "no name in suite quick has @ or ! in it"),
        (("--device", "tpu"), 2, "expected cpu, auto"),
        (("-o", __file__), 2, "expected a folder"),
    ],
)
def test_bad_arguments_get_an_answer_before_any_work(args, code, words):
    result = command(*args)
    assert result.exit_code == code and words in plain(result.output)


def test_bad_files_get_an_answer(tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    for args, words in (
        ((str(tmp_path / "none"), str(RECORDED)), "no such file"),
        ((str(bad), str(RECORDED)), "not a result file"),
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


PYTEST = """
import os, sys
os.chdir(sys.argv[1])
for name in [name for name in os.environ if name.startswith("PYTEST_")]:
    del os.environ[name]  # a worker of xdist would be told to measure nothing
sys.path[:0] = sys.argv[2].split(os.pathsep)
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[3:]]))
"""


def pytest_benchmarks(*args: str, cwd: Path = ROOT, path: str = "", **variables: str):
    return forked(PYTEST, cwd, path, *args, **variables)


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
    path = {"path": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
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
def test_the_page_is_whole_in_a_browser_and_loads_nothing(tmp_path):
    if CHROMIUM is None:
        pytest.skip("needs chromium, which .ci/run installs where it can")
    assert command("report", str(RECORDED), "-o", str(tmp_path)).exit_code == 0
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
