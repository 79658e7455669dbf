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
from fastbert.kernels._cards import LIMITS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]
ROOT = Path(__file__).resolve().parents[1]


JOBS = [
    ("attention_bwd", (80, 89), "bfloat16"),
    ("attention_bwd", (90,), "bfloat16"),
    ("attention_bwd", (80, 89, 90), "float32"),
    ("attention", (80, 89), "bfloat16"),
    ("attention", (90,), "bfloat16"),
    ("attention", (80, 89, 90), "float32"),
    ("all others", (80, 89, 90), "bfloat16"),
    ("all others", (80, 89, 90), "float32"),
]


def run_without_interpreter(*args: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=environment, capture_output=True, text=True
    )


PROGRAM = """
import json, sys
import torch
from fastbert.kernels._variants import KERNELS, variants
from fastbert.workbench.inspection import inspect_variant

kernels, archs, dtype = json.loads(sys.argv[1])
large = ("attention", "attention_bwd")
roomy = set()  # what the compiler was given where it needed few registers
seen = set()
for name in [kernels] if kernels in large else [k for k in KERNELS if k not in large]:
    for arch in archs:
        for v in variants(name, arch, dtypes=(getattr(torch, dtype),)):
            given = (v.kernel.fn.__name__, repr(sorted(v.signature.items())),
                     repr(sorted(v.constants.items())), v.num_warps, v.num_stages)
            first = (arch, v.kernel.fn.__name__) not in seen
            seen.add((arch, v.kernel.fn.__name__))
            if first or given not in roomy or (arch == 90 and v.has_dot):
                found = inspect_variant(v).resources()
                print(json.dumps(found))
                if found["registers"] <= 160:
                    roomy.add(given)
"""


@pytest.mark.parametrize(
    ("kernels", "archs", "dtype"), JOBS, ids=lambda p: str(p) if isinstance(p, str) else str(p[-1])
)
def test_every_tile_compiles_without_stack_and_reaches_the_matrix_units(kernels, archs, dtype):
    """No stack, no serialised wgmma, shared memory within limits, matrix units for products.

    What a later architecture is given like sm_80 is not compiled again where it took at most 160
    registers, but for the first tile of each kernel and for 16-bit products, which take wgmma on
    sm_90. Of 397 such tiles 242 took other registers on sm_89, at most 51 more; of 270 on sm_90
    165, at most 28 more, and as much shared memory.
    """
    result = run_without_interpreter("-c", PROGRAM, json.dumps((kernels, archs, dtype)))
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(any(f" sm_{arch} " in row["name"] for row in rows) for arch in archs)
    assert len(rows) >= 40 and not {row["name"]: row["faults"] for row in rows if row["faults"]}
    for row in rows:
        assert row["registers"] > 0 and row["programs_per_sm"] > 0, row["name"]
        assert row["spill_stores"] == row["spill_loads"] == 0, row["name"]
        if " sm_80 " in row["name"]:
            roomy = row["registers"] <= 160
            assert not roomy or row["shared"] <= LIMITS[89].shared_per_program, row["name"]


PROBE = """
import dataclasses, json
from fastbert.kernels._cards import LIMITS
from fastbert.kernels._compile import compile_variant, faults
from fastbert.kernels._variants import variants

# Too large for one warp group: its wgmma are serialised on sm_90, and it spills on sm_80.
tile = {"block_m": 128, "block_n": 128, "num_warps": 4, "num_stages": 2}
reasons = []
for arch in (90, 80):
    chosen = variants("attention", arch, tile=tile)
    variant = next(v for v in chosen if "D128 128x128 online packed" in v.name)
    found = compile_variant(variant)
    reasons.append(faults(variant, found))
    shared = LIMITS[arch].shared_per_program + 1
    broken = dataclasses.replace(found, shared=shared, ptx="")
    reasons.append(faults(variant, broken))
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
