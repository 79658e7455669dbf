"""Every shipped tile, compiled ahead of time for every supported architecture. Needs no GPU.

Runs in processes of its own: with the interpreter on, Triton's functions cannot be compiled. What
came of each is recorded, by `compiled`.
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


def run_without_interpreter(*args: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def check(record: Path, *kernels: str) -> dict[str, list]:
    """What `compiled.check` says of a record, for all kernels or some."""
    program = str(ROOT / "tests/compiled.py")
    result = run_without_interpreter(program, str(record), *kernels, WORKERS="1")
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_every_tile_compiles_without_stack_and_reaches_the_matrix_units():
    """No stack, no serialised wgmma, shared memory within limits, matrix units for products: for
    everything that can be launched, on sm_80, sm_89 and sm_90.

    What is as it was when the record was written is not compiled again, but for a sample.
    """
    found = check(ROOT / "tests/compiled.txt")
    again = "make compiled writes the record anew; look at what it changes"
    assert not found["faults"], found["faults"]
    assert not found["changed"] and not found["gone"], f"{again}: {found}"
    assert 16 < len(found["compiled"]) < 100 or len(found["compiled"]) > 1000
    kernels = {name.split()[0] for name in found["compiled"]}
    assert len(kernels) >= 16, kernels


def test_what_is_not_as_recorded_is_found(tmp_path):
    """Other code has another digest; a sampled variant has to come out as it stands there."""
    compiler, *lines = (ROOT / "tests/compiled.txt").read_text("utf-8").splitlines()
    lines = [line for line in lines if line.startswith("softmax_bwd")]
    sampled, digest, missing, *rest = lines
    names = [line.rsplit(" ", 6)[0] for line in (sampled, digest, missing)]
    changed = [
        sampled.replace("stack=0", "stack=8"),
        digest.replace(digest.split()[-6], "0" * 12),
        missing.replace("softmax_bwd_kernel", "softmax_bwd_kernel_once"),
    ]
    record = tmp_path / "compiled.txt"
    record.write_text("\n".join([compiler, *changed, *rest]), "utf-8")
    found = check(record, "softmax_bwd")
    assert found["gone"] == [names[2].replace("kernel", "kernel_once")]
    assert found["changed"] == sorted(names) and not found["faults"]
    assert set(names) <= set(found["compiled"])


PROBE = """
import dataclasses, json
import torch
from fastbert.kernels._cards import LIMITS
from fastbert.kernels._compile import compile_variant, faults
from fastbert.kernels._variants import variants
from fastbert.workbench.inspection import inspect_variant, room_for_two

# Too large for one warp group: its wgmma are serialised on sm_90, and it spills on sm_80.
tile = {"block_m": 128, "block_n": 128, "num_warps": 4, "num_stages": 2}
reasons = []
for arch in (90, 80):
    chosen = variants("attention", arch, tile=tile)
    variant = next(v for v in chosen if "D64 128x128 online packed" in v.name)
    found = compile_variant(variant)
    reasons.append(faults(variant, found))
    shared = LIMITS[arch].shared_per_program + 1
    broken = dataclasses.replace(found, shared=shared, ptx="")
    reasons.append(faults(variant, broken))

# Four of eight warps have rows of their own, the others compute theirs again.
chosen = variants("attention", 80, tile={"block_m": 64, "block_n": 128, "num_warps": 8})
variant = next(v for v in chosen if "D64 64x128 single packed" in v.name)
reasons.append(inspect_variant(variant).faults)

# A bias is read in another layout than a product's, in which scores were computed again.
chosen = list(variants("attention", 90, dtypes=(torch.bfloat16,)))
transposed = variants("attention_bwd", 80, dtypes=(torch.bfloat16,))
biased = [
    next(v for v in chosen if "D64 64x64 online padded, mask and bias" in v.name),
    next(v for v in transposed if "whole sm_80 bf16 D64 64x64 packed, bias" in v.name),
]
reasons.append([inspect_variant(v).per_element["special"] for v in biased])

# Of eight warps: with dropout they are alone unless ptxas is given a limit.
variant = next(v for v in chosen if "D64 128x64 online packed, dropout 8 bit" in v.name)
for limit in (variant.max_registers, None):
    tile = dataclasses.replace(variant.tile, max_registers=limit)
    found = inspect_variant(dataclasses.replace(variant, tile=tile))
    reasons.append([found.occupancy.programs, room_for_two(found)])
print(json.dumps(reasons))
"""


def test_the_screen_rejects_tiles_of_the_wrong_size(tmp_path):
    """Otherwise the test above could not fail.

    The second time, Triton's cache holds the kernels, and must not hide what ptxas warned of.
    """
    for _ in range(2):
        result = run_without_interpreter("-c", PROBE, TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    hopper, no_wgmma, ampere, no_mma, twice, biased, limited, unlimited = found
    assert any("serialised wgmma" in reason for reason in hopper), hopper
    assert any("bytes of stack" in reason for reason in ampere), ampere
    assert twice == ["2.1 exponentials a score"]
    assert all(1 < special < 1.2 for special in biased), "exponentials a score, and what a row has"
    assert limited == [2, []]
    assert unlimited == [1, ["alone on a multiprocessor, where two fit with 128 registers"]]
    for reasons, missing in ((no_wgmma, "no wgmma"), (no_mma, "no mma")):
        assert missing in reasons
        assert any("bytes of shared memory" in reason for reason in reasons)
