"""Everything on a GPU machine, in one call, in under nine minutes, without a network.

    python3 benchmarks/run_gpu.py RESULTS_FOLDER [--minutes 9]

Needs python3 with torch, triton, transformers, pytest, pytest-benchmark and matplotlib; nothing is
installed. First the correctness tests run on the GPU, then the targets, then the kernels, the most
important first; what there is no time for is listed as not measured. In the folder: ``tests.txt``,
``results.json``, ``report.md``, ``report.html``. The last lines printed are a short table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

CORRECTNESS = (
    "tests/test_kernel_attention.py",
    "tests/test_kernel_rows.py",
    "tests/test_kernel_linear.py",
    "tests/test_packing.py",
    "tests/test_ops.py",
    "tests/test_model_parity.py",
)
_TESTS_AT_MOST = 200.0  # seconds
# Seconds kept for the workload that is running when no other is started any more (torch.compile
# takes about a minute for an encoder), and for the reports.
_RESERVE = 90.0


def run_tests(folder: Path, seconds: float) -> str:
    """Run the correctness tests; their output goes to ``tests.txt``, a verdict comes back."""
    # Other versions than the pinned ones may warn of other things; that is not the question here.
    options = ("-q", "-x", "--no-header", "-W", "default", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", *options]
    with (folder / "tests.txt").open("w") as log:
        try:
            done = subprocess.run(
                [*command, *CORRECTNESS], cwd=ROOT, stdout=log, stderr=log, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return f"unfinished after {seconds:.0f} s, no failure until then"
    *_, last = ["no output", *(folder / "tests.txt").read_text().strip().splitlines()]
    return f"{'passed' if done.returncode == 0 else 'FAILED'}: {last.strip('= ')}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    args = parser.parse_args()
    begin = time.monotonic()

    import torch

    if not torch.cuda.is_available():
        parser.error("expected a machine with a GPU, torch.cuda.is_available() is False")
    from fastbert.benchmarks.catalogue import workloads
    from fastbert.benchmarks.report import TARGET_HEADER, target_rows
    from fastbert.benchmarks.session import run_suite
    from fastbert.benchmarks.targets import judge

    args.folder.mkdir(parents=True, exist_ok=True)
    verdict = run_tests(args.folder, min(_TESTS_AT_MOST, 60 * args.minutes / 3))
    print(f"correctness tests {verdict}", flush=True)

    todo = {w.id: w for suite in ("targets", "kernels") for w in workloads("cuda", suite)}

    def progress(i, count, workload, entries):
        reasons = [f"{e.provider}: {e.reason}" for e in entries if hasattr(e, "reason")]
        print(f"[{time.monotonic() - begin:4.0f} s] {i + 1}/{count} {workload}", flush=True)
        for reason in reasons:
            print(f"         {reason}", flush=True)

    results = run_suite(
        "targets and kernels",
        args.folder,
        device="cuda",
        chosen=todo.values(),
        seconds=1.0,
        time_budget=60 * args.minutes - (time.monotonic() - begin) - _RESERVE,
        progress=progress,
        correctness_tests=verdict,
    )
    for row in (TARGET_HEADER, *target_rows(judge(results))):
        print("  ".join(row))
    print(f"correctness tests {verdict}; {len(results.failures)} wrong results")
    return 1 if results.failures or verdict.startswith("FAILED") else 0


if __name__ == "__main__":
    sys.exit(main())
