"""The kernels of another commit, compiled by that commit's own code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import fastbert

from ..tasks.errors import InputError

__all__ = ["facts_of_commit"]


def facts_of_commit(revision: str, kernel: str, options: tuple[str, ...]) -> dict[str, dict]:
    """What a kernel of another commit compiles to, by that commit's own code in its own process.

    Args:
        revision: anything that git understands.
        options: of ``fastbert kernels inspect``.

    Returns:
        `Inspection.facts` by variant name.

    Raises:
        InputError: no such commit, one without a workbench, or a kernel that fails there.
    """
    root = Path(fastbert.__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(prefix="fastbert-diff-") as folder:
        archive = subprocess.run(
            ["git", "-C", str(root), "archive", revision], capture_output=True, check=False
        )
        if archive.returncode:
            raise InputError(f"{revision}: {archive.stderr.decode(errors='replace').strip()}")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        if not (Path(folder) / "kernels/_variants.py").exists():
            raise InputError(f"{revision}: no kernels/_variants.py in it; it is too old to inspect")
        program = "from fastbert.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", program, "kernels", "inspect", kernel, *options, "--json"],
            cwd=folder, env={**os.environ, "PYTHONPATH": folder}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise InputError(f"{revision}: {done.stderr.strip()[-500:]}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["name"]: row for row in rows}
