"""Everything on a GPU machine, in one call, in under nine minutes, without a network.

    python3 benchmarks/run_gpu.py RESULTS_FOLDER [--minutes 9] [--only STEP ...]

Needs python3 with torch, triton, transformers, pytest, pytest-benchmark and matplotlib, and for
Triton a C compiler with Python's headers; pytest-xdist if the tests are to use all cores. Nothing
is installed.

The steps are those of `steps`, in their order, each in processes of its own with a limit: whether
the machine can do it at all; every kernel at the sizes that are measured against fp64, twice; the
tests; models; kernels; where the time goes; what torch.compile takes minutes for. A step that
fails, hangs or loses its GPU costs its own results. In the folder: ``log.txt``, ``results.json``,
``report.md``, ``report.html``. The last lines printed are a short table and one verdict per step.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TESTS = (
    "test_kernel_attention_bwd",
    "test_kernel_attention",
    "test_kernel_rows",
    "test_kernel_linear",
    "test_cross_entropy",
    "test_dropout",
    "test_packing",
    "test_ops",
    "test_model_parity",
    "test_plan",
    "test_training",
    "test_padding",
    "test_drop_in",
)
_PROFILE = "profile.json"
_FOR_REPORTS = 15.0  # seconds at the end
_WORTH_STARTING = 10.0  # seconds; with less left a step is not started
_GRACE = 8.0  # seconds between the request to end and the end


@dataclass(frozen=True)
class Step:
    """Processes that run beside each other, for ``seconds`` of the nine minutes at most.

    Attributes:
        needed: without it nothing else makes sense.
        verdict: (exit codes, None where a process was ended; all output) -> what to say of it.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    seconds: float
    needed: bool = False
    verdict: Callable[[list[int | None], str], str] = lambda codes, text: verdict_of(codes)


def verdict_of(codes: list[int | None]) -> str:
    """``passed``, ``FAILED`` or ``unfinished``: a step that was ended has not passed."""
    if any(codes):
        return f"FAILED, exit codes {sorted({c for c in codes if c})}"
    return "unfinished" if None in codes else "passed"


def _verdict_of_check(codes: list[int | None], text: str) -> str:
    wrong = re.findall(r"(?m)^(\S.*): WRONG", text)
    done = len(re.findall(r"(?m)^\S.* \[\d+\.\d s\]$", text))
    return f"{verdict_of(codes)}: {done} workloads, {len(wrong)} wrong" + "".join(
        f"\n      {name}" for name in wrong
    )


def _verdict_of_tests(codes: list[int | None], text: str) -> str:
    *_, last = ["no output", *(line for line in text.splitlines() if line.strip())]
    failed = sorted(set(re.findall(r"(?m)(?:FAILED|ERROR) (\S+::\S+)", text)))
    return f"{verdict_of(codes)}: {last.strip('= ')}" + "".join(f"\n      {t}" for t in failed)


def steps(folder: Path, workers: int) -> list[Step]:
    """What a run does. The seconds of all but the last ones are accounted for: about 60 for check
    and 120 for tests is compiling, on 14 cores."""
    here = (sys.executable, "-m", "fastbert.benchmarks.gpu_steps")

    def measure(group: str) -> tuple[tuple[str, ...], ...]:
        return ((*here, "measure", group, str(folder / group.replace(" ", "-"))),)

    pytest = (
        sys.executable, "-m", "pytest", "-v", "--no-header", "--tb=short", "--maxfail=40",
        # other versions than the pinned ones may warn of other things; that is not the question
        "-W", "default", "-p", "no:cacheprovider",
        *(("-n", str(workers), "--dist", "worksteal") if _has_xdist() else ()),
        *(f"tests/{name}.py" for name in TESTS),
    )  # fmt: skip
    check = tuple((*here, "check", str(i), str(workers)) for i in range(workers))
    return [
        Step("preflight", ((*here, "preflight"),), 45, needed=True),
        Step("check", check, 90, verdict=_verdict_of_check),
        Step("tests", (pytest,), 150, verdict=_verdict_of_tests),
        Step("models", measure("models"), 110),
        Step("kernels", measure("kernels"), 90),
        Step("profile", ((*here, "profile", str(folder / _PROFILE)),), 40),
        Step("compiled kernels", measure("compiled kernels"), 90),
        Step("compiled latency", measure("compiled latency"), 150),
        Step("compiled training", measure("compiled training"), 150),
        Step("compiled throughput", measure("compiled throughput"), 150),
    ]


def _has_xdist() -> bool:
    return importlib.util.find_spec("xdist") is not None


def run_step(step: Step, seconds: float) -> tuple[list[int | None], str]:
    """Run a step's processes for so long at most.

    Returns:
        An exit code for each, None where it had to be ended; what they wrote.
    """
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    if len(step.commands) > 1:
        environment["OMP_NUM_THREADS"] = "1"
    with contextlib.ExitStack() as files:
        logs = [
            files.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            for _ in step.commands
        ]
        running = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                preexec_fn=_interruptible,
            )
            for command, log in zip(step.commands, logs, strict=True)
        ]
        end = time.monotonic() + seconds
        try:
            codes = [_wait(process, end - time.monotonic()) for process in running]
        finally:
            _end(running)
        for log in logs:
            log.seek(0)
        return codes, "".join(log.read() for log in logs)


def _interruptible() -> None:
    """What a shell starts in the background ignores interrupts, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None


def _end(processes: list[subprocess.Popen]) -> None:
    """Ask those that still run to stop, then kill them and whatever they have started."""
    for how, grace in ((signal.SIGINT, _GRACE), (signal.SIGKILL, 2.0)):
        late = [p for p in processes if p.poll() is None]
        for process in late if how == signal.SIGINT else processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, how)
        until = time.monotonic() + grace
        for process in late:  # one that hangs in the driver may not even die
            _wait(process, until - time.monotonic())


def run_all(todo: list[Step], folder: Path, minutes: float) -> dict[str, str]:
    """Run steps until the time is up; what they wrote goes to ``log.txt``.

    Returns:
        step -> verdict.
    """
    begin = time.monotonic()
    verdicts: dict[str, str] = {}
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        for step in todo:
            now = time.monotonic() - begin
            left = 60 * minutes - _FOR_REPORTS - _GRACE - now
            if left < _WORTH_STARTING:
                verdicts[step.name] = "not started: the time is up"
                continue
            codes, text = run_step(step, min(left, step.seconds))
            verdicts[step.name] = step.verdict(codes, text)
            taken = time.monotonic() - begin - now
            log.write(f"\n######## {step.name}: {verdicts[step.name]}, {taken:.0f} s\n\n{text}")
            log.flush()
            print(f"[{now:4.0f} s] {step.name}: {verdicts[step.name]} ({taken:.0f} s)", flush=True)
            if step.needed and verdicts[step.name] != "passed":
                print(text)
                break
    return verdicts


def write_results(folder: Path, groups: Path, verdicts: dict[str, str]) -> bool:
    """One result file and the reports of what the groups measured, and a short table on the screen.

    Returns:
        Whether one of our results was wrong.
    """
    from fastbert.benchmarks.report import TARGET_HEADER, target_rows, write_reports
    from fastbert.benchmarks.results import Results
    from fastbert.benchmarks.session import RESULTS_NAME
    from fastbert.benchmarks.targets import judge

    paths = (groups / s.name.replace(" ", "-") / RESULTS_NAME for s in steps(groups, 1))
    found = [Results.load(path) for path in paths if path.exists()]
    if not found:
        print("nothing was measured")
        return False
    results = Results.merged(found)
    if (groups / _PROFILE).exists():
        results.settings["profile"] = json.loads((groups / _PROFILE).read_text("utf-8"))
    results.settings["verdicts"] = {name: text.splitlines()[0] for name, text in verdicts.items()}
    results.save(folder / RESULTS_NAME)
    write_reports(Results.load(folder / RESULTS_NAME), folder)
    for row in (TARGET_HEADER, *target_rows(judge(results))):
        print("  ".join(row))
    for wrong in results.failures:
        print(f"WRONG: {wrong.workload}, {wrong.provider}: {wrong.reason}")
    return bool(results.failures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", nargs="+", metavar="STEP", help="leave the other steps out")
    args = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        parser.error("expected a machine with a GPU, torch.cuda.is_available() is False")
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fastbert-gpu-") as groups:
        todo = steps(Path(groups), max(1, min(14, (os.cpu_count() or 1) - 2)))
        names = [step.name for step in todo]
        if unknown := set(args.only or ()) - set(names):
            parser.error(f"--only: expected some of {names}, got {sorted(unknown)}")
        todo = [step for step in todo if args.only is None or step.name in args.only]
        verdicts = run_all(todo, args.folder, args.minutes)
        wrong = write_results(args.folder, Path(groups), verdicts)
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict}")
    return 1 if wrong or any("FAILED" in v for v in verdicts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
