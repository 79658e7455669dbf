"""The project's promises about itself: two commands, pinned versions, one version number."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from fastbert.benchmarks import readme
from packaging.requirements import Requirement

import fastbert

ROOT = Path(__file__).resolve().parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def test_readme_gives_a_newcomer_exactly_two_commands():
    start = read("README.md").partition("## Start")[2].partition("\n## ")[0]
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", start, re.S)
    commands = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    assert [c for c in commands if c] == ["make demo", "make test"]
    makefile = read("Makefile")
    assert re.search(r"^demo:", makefile, re.M) and re.search(r"^test:", makefile, re.M)
    assert "make test" in read(".ci/run")


def requirements() -> list[Requirement]:
    tree = ast.parse(read("setup.py"))
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and
               isinstance(n.value, str) and re.match(r"^[a-z][\w-]+>=", n.value)]  # fmt: skip
    return [Requirement(s) for s in strings]


def test_pinned_versions_are_inside_the_supported_ranges():
    lines = [line for line in read("constraints.txt").splitlines() if line and line[0] != "#"]
    pins = {p.name: next(iter(p.specifier)).version for p in map(Requirement, lines)}
    found = 0
    for requirement in requirements():
        if requirement.name in pins:
            found += 1
            assert requirement.specifier.contains(pins[requirement.name]), requirement
    assert found >= 10
    by_name = {r.name: str(r.specifier) for r in requirements()}
    assert by_name["torch"] == ">=2.11" and by_name["triton"] == ">=3.6"
    from fastbert.tasks.selfcheck import _SUPPORTED

    for name, supported in _SUPPORTED.items():
        assert set(supported.split(",")) == set(by_name[name].split(","))


def test_the_version_has_an_entry_in_the_changelog():
    assert f"## {fastbert.__version__}" in read("CHANGELOG.md")


def test_environment_variables_are_listed():
    used = set()
    for path in (ROOT / "fastbert").rglob("*.py"):
        used |= set(re.findall(r"FASTBERT_[A-Z]+", path.read_text("utf-8")))
    assert used and all(name in read("README.md") for name in used)


def test_code_is_ascii_and_lint_is_clean():
    for folder in ("kernels", "fastbert", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.read_text("utf-8").isascii(), path
    for command in (("check",), ("format", "--check")):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout[-2000:]


def test_banned_things_stay_out():
    banned = r"make_block_ptr|tl\.advance|@triton\.autotune|tl\.atomic"
    for path in (ROOT / "kernels").glob("*.py"):
        assert not re.search(banned, path.read_text("utf-8")), path
    for path in [*(ROOT / "kernels").glob("*.py"), *(ROOT / "fastbert").rglob("*.py")]:
        assert "import pytest" not in path.read_text("utf-8"), path


def test_readme_table_is_the_newest_measurement(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["readme", "--check"])
    assert readme.main() == 0, "run python -m fastbert.benchmarks.readme"
