"""Every shipped tile, compiled ahead of time for every supported architecture. Needs no GPU.

Runs in processes of its own: with the interpreter on, Triton's functions cannot be compiled.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]
ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = (80, 89, 90)
FAMILIES = ("attention", "rows", "linear")


def run_without_interpreter(*args: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tile_compiles_without_stack_and_reaches_the_matrix_units(family, arch):
    """No stack, no serialised wgmma, shared memory within limits, matrix units for products."""
    result = run_without_interpreter(
        "-m", "fastbert.kernels._screen", "--json", "--arch", str(arch), "--family", family
    )
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert rows, result.stderr[-2000:]
    assert not {row["name"]: row["faults"] for row in rows if row["faults"]}
    assert result.returncode == 0, result.stderr[-2000:]
    assert all(row["registers"] > 0 for row in rows)


PROBE = """
import dataclasses, json
from fastbert.kernels import _screen
from fastbert.kernels._tiles import AttentionTile

# Too large for one warp group: its wgmma are serialised on sm_90, and it spills on sm_80.
_screen.attention_tiles = lambda *args: [AttentionTile(128, 128, 128, 4, 2, single=False)]
reasons = []
for arch in (90, 80):
    variant = next(
        v for v in _screen.variants("attention", arch)
        if v.constants["HEAD_DIM"] == 128 and v.name.endswith("packed") and "bf16" in v.name
    )
    found = _screen.screen(variant)
    reasons.append(_screen.faults(variant, found))
    broken = dataclasses.replace(found, shared=_screen.SHARED_LIMIT[arch] + 1, wgmma=0, mma=0)
    reasons.append(_screen.faults(variant, broken))
print(json.dumps(reasons))
"""


def test_the_screen_rejects_tiles_that_are_too_large(tmp_path):
    """Otherwise the test above could not fail.

    The second time, Triton's cache holds the kernels, and must not hide what ptxas warned of.
    """
    for _ in range(2):
        result = run_without_interpreter("-c", PROBE, TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr[-2000:]
    hopper, no_wgmma, ampere, no_mma = json.loads(result.stdout.splitlines()[-1])
    assert any("serialised wgmma" in reason for reason in hopper), hopper
    assert any("bytes of stack" in reason for reason in ampere), ampere
    for reasons, missing in ((no_wgmma, "no wgmma"), (no_mma, "no mma")):
        assert missing in reasons
        assert any("bytes of shared memory" in reason for reason in reasons)
