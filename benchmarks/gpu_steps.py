"""What the steps of `run_gpu` do, each in a process of its own.

A kernel that goes wrong on a GPU may leave its process without one, or never return: nothing here
knows of any other step, and `run_gpu` ends what takes too long.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert.testing import poisoned_memory

from .catalogue import workloads
from .encoders import BASELINE, COMPILED, OWN_GRAPHS
from .encoders import EAGER as MODEL_EAGER
from .model_workloads import inference, training_step
from .operations import EAGER
from .results import Measurement
from .session import run_suite
from .tracing import profile_forward
from .workload import OURS, Unavailable, Workload, WrongResult

__all__ = [
    "GROUPS", "check", "main", "measure_group", "preflight", "profile", "resources_of", "same_bits",
]  # fmt: skip

_CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"
# fp64 scores of one workload, times three: what the processes of a check may hold together.
_LARGEST_ORACLE = 5e9


def _say(text: str) -> None:
    print(text, flush=True)


def _smi(query: str) -> str:
    command = ("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    return done.stdout.strip() or done.stderr.strip()


def preflight() -> None:
    """Say what this machine has, and stop where something is missing that everything needs.

    Raises:
        SystemExit: no C compiler or no Python headers (Triton compiles a launcher for each
            signature), or a trivial kernel that does not give what it should.
    """
    from fastbert.kernels._compile import ptxas_version

    versions = {n: importlib.metadata.version(n) for n in ("torch", "triton", "transformers")}
    _say(f"python {sys.version.split()[0]}, " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    _say(f"{torch.cuda.get_device_name()}, driver {_smi('driver_version')}, ptxas of triton: "
         f"{ptxas_version()}")  # fmt: skip
    free, total = torch.cuda.mem_get_info()
    _say(f"memory: {free / 1e9:.1f} of {total / 1e9:.1f} GB free; {_CLOCKS}: {_smi(_CLOCKS)}")
    missing = []
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        missing.append("a C compiler (cc, gcc or clang)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append("Python.h (package python3-dev)")
    if missing:
        raise SystemExit(f"Triton needs {' and '.join(missing)}")
    from fastbert import ops

    x = torch.randn(64, 128, device="cuda")
    start = time.perf_counter()
    off = (ops.softmax(x) - x.double().softmax(-1)).abs().max().item()
    _say(f"first kernel: compiled in {time.perf_counter() - start:.1f} s, off by {off:.1e}")
    if not off < 1e-6:
        raise SystemExit("a softmax of 64 x 128 values is wrong")


def same_bits(first: Iterable[Tensor], second: Iterable[Tensor]) -> bool:
    """Whether two outputs are equal bit for bit; NaN is like NaN."""
    if isinstance(first, Tensor):
        first, second = (first,), (second,)
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def _checked() -> list[Workload]:
    """Every operation at the sizes of the targets and in the breadth, backward of attention first:
    there a compiler has been wrong before (triton-lang/triton#9433)."""
    found = {w.id: w for suite in ("targets", "kernels") for w in workloads("cuda", suite)}

    def fits(w: Workload) -> bool:
        p = w.params
        scores = 24.0 * p["B"] * p["H"] * p["S"] ** 2 if w.op.startswith("attention") else 0.0
        return w.level == "kernel" and scores < _LARGEST_ORACLE

    return sorted(filter(fits, found.values()), key=lambda w: "attention backward" not in w.op)


def resources_of(kernels: list[Any]) -> str:
    """Registers of compiled kernels as the driver has them, and which have a stack.

    Offline (``tests/compiled.txt``) none has one; another ptxas may say otherwise.
    """
    most = max((kernel.n_regs for kernel in kernels), default=0)
    stacks = sorted(
        f"    {kernel.name}, {kernel.metadata.num_warps} warps: {kernel.n_regs} registers, "
        f"{4 * kernel.n_spills} bytes of stack"
        for kernel in kernels
        if kernel.n_spills
    )
    counted = f"{len(kernels)} kernels loaded, at most {most} registers, {len(stacks)} with a stack"
    return "\n".join([counted, *stacks])


def check(shard: int, of: int) -> int:
    """Each of our kernels twice on this shard's workloads: against fp64, and bit for bit.

    Says what registers they have. Also fills Triton's cache for the steps that measure. Returns how
    many are wrong.
    """
    from fastbert.kernels._launch import loaded

    wrong = 0
    todo = _checked()[shard::of]
    for workload in todo:
        start = time.perf_counter()
        try:
            prepared = workload.setup(workload, "cuda")
            run = prepared.providers[OURS]()
            with poisoned_memory():
                first, second = (run(prepared.inputs[0]) for _ in range(2))
            found = prepared.check(OURS, first)
            verdict = f"error {found.error:.2e}, budget {found.budget:.2e}"
            if not same_bits(first, second):
                verdict, wrong = "WRONG: a second run gave other bits", wrong + 1
        except WrongResult as why:
            verdict, wrong = f"WRONG: {why}", wrong + 1
        except (Unavailable, torch.OutOfMemoryError) as why:
            verdict = f"not checked: {str(why).splitlines()[0]}"
        except Exception as error:  # the others are checked all the same, if the device still works
            text = " ".join(str(error).split())[:300]
            verdict, wrong = f"WRONG: {type(error).__name__}: {text}", wrong + 1
        _say(f"{workload}: {verdict} [{time.perf_counter() - start:.1f} s]")
        prepared = run = first = second = None
        torch.cuda.empty_cache()
    _say(resources_of(loaded()))
    _say(f"checked {len(todo)} workloads, {wrong} wrong")
    return wrong


def _targets(level: str) -> list[Workload]:
    return [w for w in workloads("cuda", "targets") if w.level == level]


def _without_compile(todo: list[Workload]) -> tuple[list[Workload], set[str] | None]:
    return todo, {name for w in todo for name in w.providers} - {COMPILED}


def _compiled_model(op: str) -> Callable[[], tuple[list[Workload], set[str] | None]]:
    def group():
        chosen = [w for w in _targets("model") if w.op == op and COMPILED in w.providers]
        return chosen[:1], {OURS, OWN_GRAPHS, BASELINE, MODEL_EAGER, COMPILED}

    return group


# name -> workloads of the suite "targets", and which providers. What torch.compile takes a minute
# for is measured last and once more beside the others, so that its ratio is of one run.
GROUPS: dict[str, Callable[[], tuple[list[Workload], set[str] | None]]] = {
    "models": lambda: _without_compile(_targets("model")),
    "kernels": lambda: _without_compile(_targets("kernel")),
    "compiled kernels": lambda: (
        [w for w in _targets("kernel") if COMPILED in w.providers],
        {OURS, EAGER, COMPILED},
    ),
    "compiled latency": _compiled_model("latency"),
    "compiled training": _compiled_model("training step"),
    "compiled throughput": _compiled_model("throughput"),
}


def measure_group(name: str, folder: Path, seconds: float) -> int:
    """Measure a group into ``folder``. Returns how many of our results are wrong."""
    todo, providers = GROUPS[name]()
    begin = time.monotonic()

    def progress(i, count, workload, entries):
        times = ", ".join(
            f"{e.provider} {1e3 * e.seconds:.4g}" for e in entries if isinstance(e, Measurement)
        )
        _say(f"[{time.monotonic() - begin:4.0f} s] {i + 1}/{count} {workload}: ms: {times}")
        for entry in entries:
            if not isinstance(entry, Measurement):
                _say(f"    {entry.provider}: {entry.reason}")
        torch.cuda.empty_cache()

    results = run_suite(
        f"targets: {name}", folder, device="cuda", chosen=todo, seconds=seconds,
        providers=providers, progress=progress,
    )  # fmt: skip
    _say(f"{_CLOCKS}: {_smi(_CLOCKS)}")
    return len(results.failures)


def profile(path: Path) -> None:
    """Where the time of a call goes: kernels, gaps, and the host's share.

    Printed, and written to ``path`` as workload -> provider -> milliseconds: ``host`` until all is
    queued, ``span`` from the first kernel to the last one's end, ``busy`` with a kernel running.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for workload in (
        training_step("base", 32, 512, dtype=torch.bfloat16),
        inference("base", 1, 128, dtype=torch.bfloat16),
        inference("base", 64, 512, lengths="uniform", dtype=torch.bfloat16),
        inference("base", 64, 512, dtype=torch.bfloat16),
    ):
        prepared = workload.setup(workload, "cuda")
        for name in workload.among((OURS, OWN_GRAPHS, BASELINE)):
            run = prepared.providers[name]()
            for x in prepared.inputs:
                run(x)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for x in prepared.inputs:
                run(x)
            host = (time.perf_counter() - start) / len(prepared.inputs)
            torch.cuda.synchronize()
            traced = profile_forward(lambda run=run, x=prepared.inputs[0]: run(x))
            figures = {"host": host, "span": traced.span, "busy": traced.busy}
            figures = {key: round(1e3 * value, 3) for key, value in figures.items()}
            found.setdefault(workload.id, {})[name] = figures
            path.write_text(json.dumps(found), "utf-8")
            _say(
                f"\n{workload}, {name}: ms: {figures}, largest gap "
                f"{1e6 * traced.largest_gap:.0f} us, {sum(k.launches for k in traced.kernels)} "
                "launches"
            )
            for k in traced.kernels[:10]:
                _say(f"  {1e6 * k.seconds:9.1f} us {k.launches:4} x {k.name[:90]}")
        del prepared
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    steps.add_parser("preflight")
    steps.add_parser("profile").add_argument("path", type=Path)
    one = steps.add_parser("check")
    one.add_argument("shard", type=int)
    one.add_argument("of", type=int)
    one = steps.add_parser("measure")
    one.add_argument("group", choices=GROUPS)
    one.add_argument("folder", type=Path)
    one.add_argument("--seconds", type=float, default=0.5)
    args = parser.parse_args()
    if args.step == "preflight":
        preflight()
    elif args.step == "profile":
        profile(args.path)
    elif args.step == "check":
        return min(check(args.shard, args.of), 1)
    else:
        return min(measure_group(args.group, args.folder, args.seconds), 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
