"""What ``fastbert check`` finds out: facts about this machine, parity on a tiny model."""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple

import torch
import transformers
from packaging.specifiers import SpecifierSet

import fastbert
from fastbert.ops import backend
from fastbert.testing import assert_within_budget

__all__ = ["Check", "parity", "run_checks"]

# The ranges of setup.py.
_SUPPORTED = {"torch": ">=2.11", "triton": ">=3.6", "transformers": ">=5.17,<6"}


class Check(NamedTuple):
    """One check and how it went."""

    name: str
    passed: bool
    detail: str


def run_checks() -> tuple[dict[str, str], list[Check]]:
    """Facts about this machine by name, and the checks that were made."""
    facts = {
        "fastbert": fastbert.__version__,
        "python": platform.python_version(),
        "cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    }
    checks = []
    for package, supported in _SUPPORTED.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
            if package != "triton":
                checks.append(Check(package, False, f"expected {supported}, not installed"))
            continue
        facts[package] = found
        fits = SpecifierSet(supported).contains(found.split("+")[0], prereleases=True)
        checks.append(Check(f"{package} version", fits, f"{found}, supported {supported}"))
    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        devices.append(f"cuda:{index}")
        facts[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    if len(devices) == 1:
        facts["cuda"] = "no device"
    for name in devices:
        device = torch.device(name)
        reason = backend.unavailable(device.type, device.index)
        chosen = backend.resolve(device)
        why = f"the kernels do not: {reason}" if reason else "the kernels run here"
        forced = backend.forced()
        facts[f"backend on {name}"] = f"{chosen} ({f'forced: {forced}' if forced else why})"
        for dtype in (torch.float32,) if device.type == "cpu" else (
            torch.float32, torch.float16, torch.bfloat16
        ):  # fmt: skip
            checks.append(parity(device, dtype, chosen))
    if find_spec("triton") is not None and len(devices) == 1:
        checks.append(_kernels_in_the_interpreter())
    return facts, checks


def parity(device: torch.device, dtype: torch.dtype, chosen: str) -> Check:
    """A tiny BERT on a ragged batch, packed, against transformers in fp64."""
    name = f"parity on {device}, {str(dtype).removeprefix('torch.')}, {chosen}"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        vocab_size=50,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    theirs = transformers.BertModel(config).eval()
    ours = copy.deepcopy(theirs).to(device, dtype)
    fastbert.accelerate(ours)
    ids = torch.randint(5, 50, (4, 40))
    mask = torch.arange(40) < torch.tensor([40, 1, 13, 33])[:, None]
    with torch.inference_mode():
        rounded = copy.deepcopy(theirs).to(device, dtype)(ids.to(device), mask.to(device))[0]
        actual = ours(ids.to(device), mask.to(device))[0]
        oracle = theirs.double()(ids, mask)[0][mask]
    try:
        error, budget = assert_within_budget(
            actual.cpu()[mask], oracle, rounded.cpu()[mask], "hidden states"
        )
    except AssertionError as wrong:
        return Check(name, False, str(wrong))
    torchs = (rounded.double().cpu()[mask] - oracle).abs().max().item()
    detail = f"error {error:.1e}, transformers' own {torchs:.1e}, budget {budget:.1e}"
    return Check(name, True, detail)


_PROGRAM = """
import torch
from fastbert.tasks.selfcheck import parity
check = parity(torch.device("cpu"), torch.float32, "triton, interpreted")
print(check.passed, check.detail, sep="|")
"""


def _kernels_in_the_interpreter() -> Check:
    """The kernels, without a GPU: Triton interprets them in a process of its own."""
    name = "parity of the kernels, interpreted, float32"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FASTBERT_BACKEND": "triton"}
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True
    )
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["no message"]
        return Check(name, False, lines[-1])
    passed, _, detail = result.stdout.strip().splitlines()[-1].partition("|")
    return Check(name, passed == "True", detail)
