"""transformers' own common tests of models, run over its classes and over ours: ``make
test-transformers``.

The tests come with the source distribution of the installed transformers, which is fetched once.
Whatever passes for transformers' classes has to pass for fastbert's; anything else is listed. The
mix-ins for generation and for exporters are not in that distribution, and are left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers

CACHE = Path(__file__).resolve().parents[2] / "build" / "transformers-tests"
NAME = "transformers_tests"


def fetch() -> Path:
    """The folder of transformers' tests, of the version that is installed."""
    version = transformers.__version__
    folder = CACHE / f"transformers-{version}" / "tests"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        target = ["--dest", str(CACHE), f"transformers=={version}"]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, *target], check=True)
        with tarfile.open(CACHE / f"transformers-{version}.tar.gz") as archive:
            inside = f"transformers-{version}/tests/"
            members = [m for m in archive.getmembers() if m.name.startswith(inside)]
            archive.extractall(CACHE, members, filter="data")
    return folder


class Outcomes:
    """A plugin of pytest: what became of each test, whose parts may report as well."""

    _ORDER = ("skipped", "passed", "failed")

    def __init__(self):
        self.of: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report) -> None:
        case, test = report.nodeid.split("::")[-2:]
        if report.when == "call" or report.outcome != "passed":
            before = self.of.get((case, test), "skipped")
            self.of[case, test] = max(before, report.outcome, key=self._ORDER.index)


def main(*options: str) -> int:
    """Run, compare, and say what differs; 1 if something passes for transformers' classes only."""
    fetch()
    here = Path(__file__).resolve().parent
    # For the workers of pytest-xdist; what users have on a CPU is what is tested.
    os.environ.update(PYTHONPATH=f"{here}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    os.environ.setdefault("FASTBERT_BACKEND", "torch")
    outcomes = Outcomes()
    file = str(here / "common.py")
    quiet = ["-q", "--no-header", "--tb=short", "-W", "ignore"]
    own_rules = ["-o", "addopts=--import-mode=importlib", "-o", "filterwarnings="]
    pytest.main([*quiet, *own_rules, file, *options], [outcomes])
    passed = {side: set() for side in ("transformers", "fastbert")}
    for (case, test), outcome in outcomes.of.items():
        side, _, family = case.partition("_")
        if outcome == "passed":
            passed[side].add((family, test))
    missing = sorted(passed["transformers"] - passed["fastbert"])
    ran = {test for (_, test), outcome in outcomes.of.items() if outcome != "skipped"}
    print(
        f"transformers {transformers.__version__}: of {len(ran)} common tests "
        f"{len(passed['transformers'])} pass for its classes, {len(passed['fastbert'])} for ours"
    )
    for family, test in missing:
        print(f"only for transformers' classes: {family} {test}")
    return 1 if missing or not passed["transformers"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
