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
from fastbert.kernels._compile import assembled_for
from fastbert.kernels._variants import KERNELS, variants
from fastbert.workbench.inspection import inspect_variant

kernels, archs, dtype = json.loads(sys.argv[1])
large = ("attention", "attention_bwd")
made = {}  # by what the compiler was given: what it made of that for sm_80
seen = set()
for name in [kernels] if kernels in large else [k for k in KERNELS if k not in large]:
    for arch in archs:
        for v in variants(name, arch, dtypes=(getattr(torch, dtype),)):
            given = (v.kernel.fn.__name__, repr(sorted(v.signature.items())),
                     repr(sorted(v.constants.items())), v.num_warps, v.num_stages)
            first = (arch, v.kernel.fn.__name__) not in seen
            seen.add((arch, v.kernel.fn.__name__))
            earlier = made.get(given)
            same_ptx = arch < 90 or (dtype == "float32" and not v.has_dot)
            takes_wgmma = arch == 90 and v.has_dot and dtype != "float32"
            if earlier and not first and earlier.registers <= 160 and not takes_wgmma:
                continue
            if earlier and not first and same_ptx:
                found = inspect_variant(v, assembled_for(earlier, arch))
            else:
                found = inspect_variant(v)
            if arch == 80:
                made[given] = found.artefact
            row = found.resources()
            if earlier and first and same_ptx:
                again = inspect_variant(v, assembled_for(earlier, arch)).resources()
                row["the same"] = {k: again[k] for k in row} == row
            print(json.dumps(row))
"""


@pytest.mark.parametrize(
    ("kernels", "archs", "dtype"), JOBS, ids=lambda p: str(p) if isinstance(p, str) else str(p[-1])
)
def test_every_tile_compiles_without_stack_and_reaches_the_matrix_units(kernels, archs, dtype):
    """No stack, no serialised wgmma, shared memory within limits, matrix units for products.

    For sm_89, and in fp32 for sm_90 where there are no products, Triton makes the PTX that it makes
    for sm_80 of the same tile, so that is only assembled again; that it comes to the same is tried
    on the first tile of each kernel. But for 16-bit products, which take wgmma on sm_90, nothing is
    done where sm_80 took at most 160 registers: of 397 such tiles 242 took other registers on
    sm_89, at most 51 more; of 270 on sm_90 165, at most 28 more, and as much shared memory.
    """
    result = run_without_interpreter("-c", PROGRAM, json.dumps((kernels, archs, dtype)))
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(any(f" sm_{arch} " in row["name"] for row in rows) for arch in archs)
    assert len(rows) >= 40 and not {row["name"]: row["faults"] for row in rows if row["faults"]}
    assert not any(row.get("the same") is False for row in rows)
    assert any("the same" in row for row in rows) == (80 in archs)
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
