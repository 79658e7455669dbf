"""``kernels/`` is ``fastbert.kernels`` in every way of installing, and never a package of its own.

Each mode gets a virtual environment whose dependencies come from this one by a .pth file, so that
nothing is downloaded. Beside ours stands a package that is named "kernels", as Hugging Face's is.
"""

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
from checkout import copy_checkout

pytestmark = pytest.mark.slow
MODES = ("wheel", "editable", "editable compat", "editable strict", "not installed")
PROGRAM = """
import fastbert, fastbert.kernels._tiles as tiles
print("OURS", tiles.__file__)
print("LINEAR", tiles.linear_route.__module__)
import kernels
print("THEIRS", kernels.MARK, kernels.__file__)
print("PACKAGE", fastbert.__file__)
"""
# Runs programs in places, each in a process of its own that begins with what takes long to import
# and looks for nobody's `kernels`; then it reads a folder of packages as starting does.
IN_PLACES = """
import os, site, sys
import torch, triton.language
rest = sys.argv[1:]
for packages, place, program in zip(rest[::3], rest[1::3], rest[2::3]):
    child = os.fork()
    if child == 0:
        os.chdir(place)
        site.addsitedir(packages)
        sys.argv[1:] = [packages + "/kernels"]
        exec(program)
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0, (packages, place)
    print("NEXT", flush=True)
"""
# It looks for their package; with ours in its place it would not be imported.
TRANSFORMERS = """
from transformers import BertModel
print("TRANSFORMERS", BertModel.__name__)
"""
# Before their package is there, and after.
ALONE = """
import importlib.util, pathlib, sys
import fastbert.benchmarks.shapes
import fastbert.kernels._tiles as tiles
print("ALONE", tiles.__name__, importlib.util.find_spec("kernels") is None)
theirs = pathlib.Path(sys.argv[1])
theirs.mkdir()
(theirs / "__init__.py").write_text("MARK = 'hugging face'\\n")
importlib.invalidate_caches()
"""


def clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}


def run(*command: object, cwd: Path) -> str:
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=clean_environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy, so that builds leave nothing in the checkout."""
    return copy_checkout(tmp_path_factory.mktemp("source"))


def environment_in(folder: Path) -> tuple[Path, Path]:
    """A virtual environment without anything: its Python, where its packages lie."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin/python"
    program = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return python, Path(run(python, "-c", program, cwd=folder).strip())


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory) -> Path:
    """Packages of this environment, without the finder of our own editable install."""
    shared = tmp_path_factory.mktemp("dependencies")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "fastbert" not in entry.name and entry.suffix != ".pth" and entry.name != "kernels":
            (shared / entry.name).symlink_to(entry)
    return shared


def installed(mode: str, source: Path, dependencies: Path, folder: Path) -> Path:
    """Where the packages of an environment lie in which ours is installed."""
    folder.mkdir()
    python, site = environment_in(folder / "venv")
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
               "--no-build-isolation", "--no-compile", "--disable-pip-version-check"]  # fmt: skip
    if mode == "wheel":
        run(*install, source, cwd=folder)
        assert (site / "fastbert/kernels/attention.py").is_file()
    elif mode != "not installed":
        style = mode.partition(" ")[2]
        config = ["--config-settings", f"editable_mode={style}"] if style else []
        run(*install, *config, "--editable", source, cwd=folder)
    assert not (site / "kernels").exists(), "we install a top-level package named kernels"
    return site


def test_kernels_are_ours_and_theirs_stay_theirs(source, dependencies, tmp_path):
    python, packages = environment_in(tmp_path / "started")
    (packages / "dependencies.pth").write_text(f"{dependencies}\n")
    cases, programs = [], []
    for mode in MODES:
        folder = tmp_path / mode.replace(" ", "-")
        site = installed(mode, source, dependencies, folder)
        places = [source] if mode == "not installed" else [folder, source]
        for place in places:
            alone, whole = place is places[0], mode == "not installed"
            cases.append((mode, site, place, alone))
            programs += [site, place, ALONE * alone + PROGRAM + TRANSFORMERS * whole]
    said = run(python, "-c", IN_PLACES, *programs, cwd=tmp_path).split("NEXT\n")
    for (mode, site, place, alone), out in zip(cases, said[:-1], strict=True):
        if alone:  # for some the checkout itself is on the path
            absent = mode in ("wheel", "editable", "editable strict")
            assert f"ALONE fastbert.kernels._tiles {absent}" in out, mode
        assert "LINEAR fastbert.kernels._tiles" in out, mode
        assert mode != "not installed" or "TRANSFORMERS BertModel" in out
        expected = str(site) if mode == "wheel" and place != source else str(source)
        if "strict" not in mode:
            assert f"OURS {expected}" in out, (mode, out)
        assert f"THEIRS hugging face {site / 'kernels'}" in out, (mode, out)
