"""Result files: what was measured, on what, and how two of them differ.

One JSON per run. A measurement cannot be made without a check that passed, so no file holds a
number of a wrong result. Times are seconds.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "DISTURBED",
    "Change",
    "Check",
    "Measurement",
    "NotMeasured",
    "Results",
    "compare",
    "machine_facts",
    "quantiles",
]

SCHEMA = 1
DISTURBED = 1.15  # pace above which times were taken while something else ran
_ABOVE_LIMIT = 1.05  # share of a limit that is no longer the noise of measuring it
_PACKAGES = (
    "torch", "triton", "transformers", "onnxruntime", "openvino", "ctranslate2",
    "sentence-transformers",
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """That an output was compared, and how far off it was."""

    passed: bool
    error: float
    budget: float
    against: str


@dataclass(frozen=True)
class Measurement:
    """One provider on one workload: samples of the same rounds as its neighbours'.

    ``pace`` is how many times as long as in its best moment the machine took for a fixed product,
    before or after those rounds; None where that was not measured.

    Raises:
        ValueError: without a check that passed, or without samples.
    """

    workload: str
    op: str
    level: str
    params: dict[str, Any]
    dtype: str
    provider: str
    reference: str
    check: Check
    wall: list[float]
    device: list[float] | None
    tokens: int
    flops: float | None
    bytes: float | None
    peak_memory: int | None
    how: str
    pace: float | None = None

    def __post_init__(self):
        if not (isinstance(self.check, Check) and self.check.passed is True):
            raise ValueError(
                f"{self.workload}, {self.provider}: a measurement needs a correctness check that "
                f"passed, got {self.check!r}"
            )
        if not self.wall or not all(math.isfinite(t) and t > 0 for t in self.wall):
            raise ValueError(
                f"{self.workload}, {self.provider}: expected positive times, got {self.wall!r}"
            )

    @property
    def disturbed(self) -> bool:
        """Whether something else slowed the machine down meanwhile."""
        return self.pace is not None and self.pace > DISTURBED

    @property
    def times(self) -> list[float]:
        """Seconds that count: the device's where it was timed and the work is a kernel."""
        return self.device if self.device is not None and self.level == "kernel" else self.wall

    @property
    def seconds(self) -> float:
        """Median of `times`."""
        return statistics.median(self.times)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens, padding does not count."""
        return self.tokens / self.seconds

    @property
    def tflops(self) -> float | None:
        return None if not self.flops else self.flops / self.seconds / 1e12

    @property
    def gbs(self) -> float | None:
        return None if not self.bytes else self.bytes / self.seconds / 1e9

    def speedup_over(self, other: Measurement) -> float:
        """How many times as fast as ``other``: median over rounds where both have one."""
        if len(self.times) == len(other.times):
            return statistics.median(b / a for a, b in zip(self.times, other.times, strict=True))
        return other.seconds / self.seconds


@dataclass(frozen=True)
class NotMeasured:
    """A provider without a number, and why. ``failed``: it ran and was wrong."""

    workload: str
    provider: str
    reason: str
    failed: bool = False


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    if len(times) < 2:
        return times[0], times[0], times[0]
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return p20, statistics.median(times), p80


@dataclass
class Results:
    """Everything of one run."""

    machine: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    not_measured: list[NotMeasured] = field(default_factory=list)

    def add(self, entry: Measurement | NotMeasured) -> None:
        """Keep a measurement, or the reason why there is none."""
        (self.measurements if isinstance(entry, Measurement) else self.not_measured).append(entry)

    @classmethod
    def merged(cls, parts: list[Results]) -> Results:
        """One file's worth of several runs on one machine.

        A workload that more than one of them measured is that of the last one alone, since only
        what was timed in turn may be divided by each other. Limits are the highest seen.
        """
        whole = cls(parts[0].machine, dict(parts[0].settings))
        whole.settings["suite"] = "; ".join(str(part.settings.get("suite")) for part in parts)
        for part in parts:
            measured = {m.workload for m in part.measurements}
            whole.measurements = [m for m in whole.measurements if m.workload not in measured]
            whole.measurements += part.measurements
            whole.not_measured += part.not_measured
            for name, limit in part.limits.items():
                whole.limits[name] = max(limit, whole.limits.get(name, 0.0))
        return whole

    def share_of_limit(self, m: Measurement) -> float | None:
        """Least time at the limits measured in this run over the time taken: 1 is the most that
        this machine did. None where nothing was measured, or where `beyond_limit` says why."""
        shares = self._shares_of_limits(m)
        if not shares or max(shares.values()) > _ABOVE_LIMIT:
            return None
        return min(1.0, max(shares.values()))

    def beyond_limit(self, m: Measurement) -> str | None:
        """Why something was faster than the limit, which then is none; None if it was not.

        Operands that stay in a cache are faster than a copy that does not fit it. A product that is
        faster than the fastest one means that either of the two is wrong.
        """
        shares = self._shares_of_limits(m)
        if not shares or max(shares.values()) <= _ABOVE_LIMIT:
            return None
        return "in cache" if max(shares, key=shares.get) == "copy" else "above the limit measured"

    def _shares_of_limits(self, m: Measurement) -> dict[str, float]:
        copy, top = self.limits.get("copy_gbs"), self.limits.get(f"matmul_tflops_{m.dtype}")
        if not copy or not m.bytes:
            return {}
        shares = {"copy": m.bytes / (1e9 * copy) / m.seconds}
        if m.flops and top:
            shares["matmul"] = m.flops / (1e12 * top) / m.seconds
        return shares

    @property
    def failures(self) -> list[NotMeasured]:
        """Wrong results."""
        return [n for n in self.not_measured if n.failed]

    def find(
        self, op: str, provider: str, dtype: str | None = None, **params: Any
    ) -> Measurement | None:
        """The measurement with just these parameters, or None; a flag that is False may be left
        out."""
        wanted = _flags_that_are_set(params)
        for m in self.measurements:
            same = (m.op, m.provider) == (op, provider) and dtype in (None, m.dtype)
            if same and _flags_that_are_set(m.params) == wanted:
                return m
        return None

    def by_workload(self) -> Iterator[tuple[str, list[Measurement]]]:
        """Workloads in the order in which they ran."""
        groups: dict[str, list[Measurement]] = {}
        for m in self.measurements:
            groups.setdefault(m.workload, []).append(m)
        yield from groups.items()

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        data = {"schema": SCHEMA, **asdict(self)}
        for entry, m in zip(data["measurements"], self.measurements, strict=True):
            for key in ("wall", "device"):
                entry[key] = entry[key] and [float(f"{t:.5g}") for t in entry[key]]
            for key in ("error", "budget"):
                entry["check"][key] = float(f"{entry['check'][key]:.3g}")
            # for readers; `load` takes them from the samples
            entry["p20_median_p80"] = [float(f"{t:.5g}") for t in quantiles(m.times)]
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(_compact(data), "utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file that `save` wrote.

        Raises:
            ValueError: not such a file, another schema, or a measurement without a green check.
        """
        try:
            data = json.loads(Path(path).read_text("utf-8"))
            schema = data.pop("schema")
            if schema != SCHEMA:
                raise ValueError(f"schema {schema}, this version reads {SCHEMA}")
            measurements = []
            for m in data.pop("measurements"):
                m.pop("p20_median_p80", None)
                measurements.append(Measurement(**{**m, "check": Check(**m["check"])}))
            missing = [NotMeasured(**n) for n in data.pop("not_measured")]
            return cls(**data, measurements=measurements, not_measured=missing)
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path}: not a result file of fastbert bench: {error}") from error


def _flags_that_are_set(params: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in params.items() if value is not False}


def _compact(data: dict[str, Any]) -> str:
    """JSON with one measurement a line: small, and readable in a diff."""
    rows = {key: data.pop(key) for key in ("measurements", "not_measured")}
    text = json.dumps(data, indent=1)[:-2]
    for key, values in rows.items():
        body = ",\n  ".join(json.dumps(v) for v in values)
        text += f',\n "{key}": [\n  {body}\n ]' if values else f',\n "{key}": []'
    return text + "\n}\n"


@dataclass(frozen=True)
class Change:
    """One provider on one workload in two files: times as much as before, and what noise allows."""

    workload: str
    provider: str
    ratio: float  # new time / old time; below 1 is faster
    noise: float  # ratios within 1 +- noise are not a change
    relative_to: str | None  # the provider of the same run that both times were divided by

    @property
    def verdict(self) -> str:
        if self.ratio > 1 + self.noise:
            return "slower"
        return "faster" if self.ratio < 1 / (1 + self.noise) else "same"


def compare(old: Results, new: Results, *, floor: float = 0.03) -> list[Change]:
    """What moved between two files beyond noise.

    Where both hold the workload's reference provider, times are divided by it round by round, so
    that a machine that was slower as a whole is no change. The noise of a median is taken as its
    normal error from the spread of the samples, times three, and never below ``floor``.
    """
    changes = []
    for now in new.measurements:
        before = old.find(now.op, now.provider, now.dtype, **now.params)
        if before is None:
            continue
        relative_to, pair = None, (before.times, now.times)
        if now.provider != now.reference:
            references = [
                r.find(now.op, now.reference, now.dtype, **now.params) for r in (old, new)
            ]
            if all(r is not None for r in references):
                relative_to = now.reference
                pair = tuple(
                    [a / b for a, b in zip(m.times, r.times, strict=False)]
                    for m, r in zip((before, now), references, strict=True)
                )
        medians = [statistics.median(p) for p in pair]
        noise = 3 * math.hypot(*(_median_error(p) for p in pair))
        changes.append(
            Change(
                now.workload, now.provider, medians[1] / medians[0], max(floor, noise), relative_to
            )
        )
    return changes


def _median_error(values: list[float]) -> float:
    """Relative standard error of the median, from the 20-80 spread (1.68 sigma if normal)."""
    p20, median, p80 = quantiles(values)
    return 1.25 * (p80 - p20) / 1.68 / median / math.sqrt(len(values))


def machine_facts(device: str) -> dict[str, Any]:
    """What a reader needs to run this again."""
    import fastbert

    facts: dict[str, Any] = {
        "kind": device,
        "device": _cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
        "cpu": _cpu_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "fastbert": fastbert.__version__,
        **{name: _version(name) for name in _PACKAGES},
        **_git_facts(Path(fastbert.__file__).resolve().parents[1]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    if device == "cuda":
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        keys = ("driver", "sm_clock", "sm_clock_max", "memory_clock", "power_limit")
        answer = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
        values = answer.splitlines()[0].split(", ") if answer else [None] * len(keys)
        facts |= dict(zip(keys, values, strict=False)) | {"cuda": torch.version.cuda}
    return facts


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_facts(root: Path) -> dict[str, Any]:
    """Commit, and whether code that is measured differs from it (results may)."""
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}
    changed = _output(
        "git", "-C", str(root), "status", "--porcelain", "--", "kernels", "fastbert",
        "benchmarks/*.py",
    )  # fmt: skip
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    return {"commit": commit or None, "dirty": bool(changed)}


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
