"""transformers' own common tests of models, run over our classes: ``make test-transformers``.

The tests come with the source distribution of the installed transformers, which is fetched once.
Whatever passes for transformers' classes has to pass for fastbert's, so every test of theirs that
has not passed for ours, or did not run, is run over theirs; what passes there is listed. The
mix-ins for generation and for exporters are not in that distribution, and are left out.

A test that comes in many variants (of dtype, padding and mask) is run in every third of them for
each family, so that each variant is run for five families. All of them are run for families that
are named (``FAMILIES=bert,mpnet``), and for all with ``VARIANTS=all``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import unittest
from pathlib import Path

import pytest
import transformers

CACHE = Path(__file__).resolve().parents[2] / "build" / "transformers-tests"
NAME = "transformers_tests"
_LOADER = unittest.defaultTestLoader
_VARIANT = re.compile(r"test_eager_matches_sdpa_inference_(\d+)_")
_EVERY = 1 if os.environ.get("VARIANTS") == "all" or os.environ.get("FAMILIES") else 3


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
        self.of: dict[str, str] = {}

    def pytest_runtest_logreport(self, report) -> None:
        case = report.nodeid.partition("::")[2]
        if report.when == "call" or report.outcome != "passed":
            before = self.of.get(case, "skipped")
            self.of[case] = max(before, report.outcome, key=self._ORDER.index)


def main(*options: str) -> int:
    """Run, compare, and say what differs; 1 if something passes for transformers' classes only."""
    fetch()
    here = Path(__file__).resolve().parent
    # For the workers of pytest-xdist; what users have on a CPU is what is tested.
    os.environ.update(PYTHONPATH=f"{here}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    os.environ.setdefault("FASTBERT_BACKEND", "torch")
    import common  # with the variables as they are for the workers

    names = [
        f"{family}::{test}"
        for number, family in enumerate(common.FAMILIES)
        for test in _LOADER.getTestCaseNames(vars(common)[f"transformers_{family}"])
        if (variant := _VARIANT.match(test)) is None or (int(variant[1]) - number) % _EVERY == 0
    ]
    ours = _run([f"fastbert_{name}" for name in names], options)
    became = [ours.get(f"fastbert_{name}", "not run") for name in names]
    others = [n for n, outcome in zip(names, became, strict=True) if outcome != "passed"]
    theirs = _run([f"transformers_{name}" for name in others], options)
    missing = sorted(case for case, outcome in theirs.items() if outcome == "passed")
    counts = ", ".join(f"{became.count(what)} {what}" for what in dict.fromkeys(became))
    print(
        f"transformers {transformers.__version__}, {len(common.FAMILIES)} families, "
        f"{len(names)} common tests; for our classes: {counts}; "
        f"of the others {len(missing)} pass for its classes"
    )
    for case in missing:
        print(f"only for transformers' classes: {case}")
    return 1 if missing or "passed" not in became else 0


def _run(cases: list[str], options: tuple[str, ...]) -> dict[str, str]:
    """What became of each test of these classes, or of these tests, by its name."""
    if not cases:
        return {}
    outcomes = Outcomes()
    file = Path(__file__).with_name("common.py")
    quiet = ["-q", "--no-header", "--tb=short", "-W", "ignore"]
    own_rules = ["-o", "addopts=--import-mode=importlib", "-o", "filterwarnings="]
    pytest.main([*quiet, *own_rules, *(f"{file}::{case}" for case in cases), *options], [outcomes])
    return outcomes.of


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
