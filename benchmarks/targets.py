"""What the project promises: each row a mark and a goal, judged from one result file.

"Mark" is what something published supports, "goal" is past it. Below the mark is a defect to
explain, between mark and goal there is work left. A row whose workloads were not measured says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .attention_operations import SDPA
from .encoders import (
    BASELINE,
    COMPILED,
    CTRANSLATE2,
    EAGER,
    FREEZING,
    OPENVINO,
    ORT,
    OWN_FROZEN,
    OWN_GRAPHS,
    OWN_PADDED,
    TORCH_ENCODER,
)
from .operations import EAGER as TORCH_EAGER
from .results import Measurement, Results
from .shapes import draw_lengths, fill_of
from .workload import OURS

__all__ = ["STATUSES", "TARGETS", "Judged", "Target", "judge"]

STATUSES = ("pass", "between", "below", "not measured")


@dataclass(frozen=True)
class Target:
    """One figure. ``mark`` None: only a goal exists. Values are judged as ``higher`` says."""

    kind: str  # "cpu" or "cuda"
    workload: str
    figure: str
    value: Callable[[Results], float | None]
    mark: float | None
    goal: float | None
    unit: str = "x"
    higher: bool = True


@dataclass(frozen=True)
class Judged:
    """A target with the value of one result file."""

    target: Target
    value: float | None

    @property
    def status(self) -> str:
        """One of `STATUSES`."""
        t, value = self.target, self.value
        if value is None:
            return "not measured"
        sign = 1 if t.higher else -1
        if t.goal is None or sign * value >= sign * t.goal:
            reached_mark = t.mark is None or sign * value >= sign * t.mark
            return "pass" if reached_mark else "below"
        return "between" if t.mark is None or sign * value >= sign * t.mark else "below"


def judge(results: Results) -> list[Judged]:
    """Every target of the kind of device that was measured, in the order of the table."""
    return [Judged(t, t.value(results)) for t in TARGETS if t.kind == results.machine["kind"]]


def _speedup(
    op: str, other: str, provider: str = OURS, **where
) -> Callable[[Results], float | None]:
    def value(results: Results) -> float | None:
        ours, theirs = results.find(op, provider, **where), results.find(op, other, **where)
        return None if ours is None or theirs is None else ours.speedup_over(theirs)

    return value


def _of(op: str, figure: Callable[[Measurement, Results], float | None], provider=OURS, **where):
    def value(results: Results) -> float | None:
        found = results.find(op, provider, **where)
        return None if found is None else figure(found, results)

    return value


def _worst(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return min(known, default=None)


def _milliseconds(m: Measurement, _: Results) -> float:
    return 1e3 * m.seconds


def _sequences(m: Measurement, _: Results) -> float:
    return m.params["B"] / m.seconds


def _tokens(m: Measurement, _: Results) -> float:
    return m.tokens_per_second


def _tflops(m: Measurement, _: Results) -> float | None:
    return m.tflops


def _of_copy(m: Measurement, results: Results) -> float | None:
    share = results.share_of_limit(m)
    return None if share is None else 100 * share


def _wall_over_device(m: Measurement, _: Results) -> float | None:
    if m.device is None:
        return None
    return statistics.median(m.wall) / statistics.median(m.device)


# ---- CPU ----

_DENSE_OPS = ("latency", "throughput")
_EVERY = "latency, every length"
_LENGTHS = {"model": "minilm", "B": 1, "S": 256}
# Whoever runs the weights as they are, and whoever keeps copies of them; ours is compared with its
# like, and frozen with all.
_AS_THEY_ARE = (BASELINE, EAGER, COMPILED, TORCH_ENCODER)
_PEERS = (*_AS_THEY_ARE, FREEZING, ORT, OPENVINO, CTRANSLATE2)


def _ours(results: Results, ops: Iterable[str], provider: str = OURS) -> list[Measurement]:
    """In fp32, of all models but the tiny one, which is there for the tests of this suite."""
    return [
        m
        for m in results.measurements
        if m.provider == provider
        and m.op in ops
        and m.dtype == "float32"
        and m.params.get("model") != "tiny"
    ]


def _theirs(results: Results, m: Measurement, provider: str) -> Measurement | None:
    return results.find(m.op, provider, m.dtype, **m.params)


def _over_sdpa(ops: Iterable[str], weigh: Callable[[Measurement], float] = lambda m: 1.0):
    def value(results: Results) -> float | None:
        return _worst(
            m.speedup_over(sdpa) * weigh(m)
            for m in _ours(results, ops)
            if (sdpa := _theirs(results, m, BASELINE)) is not None
        )

    return value


def _over_best_peer(
    ops: Iterable[str], provider: str = OURS, among: tuple[str, ...] = _PEERS
) -> Callable[[Results], float | None]:
    """The smallest ratio to the fastest peer of each workload; peers that were not there do not
    count, but one besides sdpa must be."""

    def value(results: Results) -> float | None:
        ratios = []
        for m in _ours(results, ops, provider):
            peers = [p for name in among if (p := _theirs(results, m, name)) is not None]
            if len(peers) > 1 or (peers and BASELINE not in among):
                ratios.append(min(m.speedup_over(p) for p in peers))
        return _worst(ratios)

    return value


def _fill(m: Measurement) -> float:
    p = m.params
    return fill_of(draw_lengths(p["lengths"], p["B"], p["S"]))


def _random_over_sorted(results: Results) -> float | None:
    orders = (results.find(_EVERY, OWN_FROZEN, **_LENGTHS, order=o) for o in ("random", "sorted"))
    shuffled, in_order = orders
    if shuffled is None or in_order is None:
        return None
    return in_order.seconds / shuffled.seconds


_CPU = (
    Target("cpu", "dense batches", "slowest against sdpa", _over_sdpa(_DENSE_OPS), 1.0, 1.0),
    Target(
        "cpu", "dense batches", "slowest against the best peer that freezes nothing",
        _over_best_peer(_DENSE_OPS, among=_AS_THEY_ARE), None, 1.0,
    ),
    Target(
        "cpu", "dense batches, frozen", "slowest against ONNX Runtime",
        _over_best_peer(_DENSE_OPS, OWN_FROZEN, (ORT,)), 1.0, None,
    ),
    Target(
        "cpu", "dense batches, frozen", "slowest against the best peer",
        _over_best_peer(_DENSE_OPS, OWN_FROZEN), None, 1.0,
    ),
    Target(
        "cpu", "latency, MiniLM, B1 S32", "against sdpa",
        _speedup("latency", BASELINE, model="minilm", B=1, S=32), 1.0, 1.25,
    ),
    Target(
        "cpu", "latency, lengths 1 to 256 in random order, frozen", "against the best peer",
        _over_best_peer((_EVERY,), OWN_FROZEN), 1.0, 1.0,
    ),
    Target(
        "cpu", "latency, lengths 1 to 256 in random order, frozen", "against the same ones sorted",
        _random_over_sorted, 0.9, 1.0,
    ),
    Target(
        "cpu", "ragged batches", "least of speed-up over sdpa times fill",
        _over_sdpa(("ragged",), _fill), 1.0, 1.1,
    ),
    Target(
        "cpu", "ragged batches, half full", "slowest against the best peer",
        _over_best_peer(("ragged",)), 1.0, 1.8,
    ),
    Target(
        "cpu", "ragged batches, half full, frozen", "slowest against the best peer",
        _over_best_peer(("ragged",), OWN_FROZEN), 1.0, 1.8,
    ),
    Target(
        "cpu", "training step, MLM, half full", "against sdpa",
        _over_sdpa(("training step",)), 1.7, 2.2,
    ),
)  # fmt: skip

# ---- GPU ----

_B1 = {"model": "base", "B": 1, "S": 128}
_B1_GRAPHS = {**_B1, "provider": OWN_GRAPHS}
_LARGE_B1_GRAPHS = {**_B1_GRAPHS, "model": "large"}
_DENSE = {"model": "base", "B": 64, "S": 512}
_HALF = {**_DENSE, "lengths": "uniform"}
_TRAIN = {"model": "base", "B": 32, "S": 512, "lengths": "fixed"}
_TRAIN_HALF = {**_TRAIN, "lengths": "uniform"}
_ATT = {"H": 12, "D": 64}


def _token_rate_of_dense(results: Results) -> float | None:
    """Useful tokens per second on the ragged batch, in percent of the dense one's."""
    ragged = results.find("ragged", OURS, **_HALF)
    dense = results.find("throughput", OURS, **_DENSE)
    if ragged is None or dense is None:
        return None
    return 100 * ragged.tokens_per_second / dense.tokens_per_second


def _varlen_of_dense(results: Results) -> float | None:
    ragged = results.find("attention forward", OURS, B=64, S=512, lengths="uniform", **_ATT)
    dense = [results.find("attention forward", OURS, B=32768 // s, S=s, **_ATT) for s in (256, 512)]
    if ragged is None or None in dense or ragged.tflops is None:
        return None
    # half the tokens at other lengths: as many operations at the rate of the nearest dense sizes
    return 100 * ragged.tflops / min(m.tflops for m in dense)


def _over_best_sdpa(length: int) -> Callable[[Results], float | None]:
    """Against the fastest of sdpa's backends on dense attention, forward."""
    where = {"B": 32768 // length, "S": length, **_ATT}

    def value(results: Results) -> float | None:
        ours = results.find("attention forward", OURS, **where)
        theirs = [results.find("attention forward", name, **where) for name in SDPA]
        return _worst(ours.speedup_over(m) for m in theirs if m is not None) if ours else None

    return value


def _attention(direction: str, length: int, mark: float | None, goal: float | None) -> Target:
    op, where = f"attention {direction}", {"B": 32768 // length, "S": length, **_ATT}
    return Target(
        "cuda", f"{op}, D64, S{length}", "rate", _of(op, _tflops, **where), mark, goal, " TFLOP/s"
    )


def _rows(op: str, mark: float, goal: float, **where) -> Target:
    size = "x".join(str(v) for k, v in where.items() if k in "MN")
    return Target(
        "cuda", f"{op}, {size}", "of the copy bandwidth measured here",
        _of(op, _of_copy, **where), mark, goal, " %",
    )  # fmt: skip


def _against_compile(op: str, mark: float, **where) -> Target:
    size = "x".join(str(v) for k, v in where.items() if k in "MN")
    value = _speedup(op, COMPILED, **where)
    return Target("cuda", f"{op}, {size}", "against torch.compile", value, mark, mark)


def _memory_ratio(results: Results) -> float | None:
    ours, theirs = (results.find("training step", p, **_TRAIN) for p in (OURS, BASELINE))
    if ours is None or theirs is None or not (ours.peak_memory and theirs.peak_memory):
        return None
    return ours.peak_memory / theirs.peak_memory


_LARGE_SQUAD = {"model": "large", "B": 64, "S": 384, "lengths": "squad"}
_MAX_AUTOTUNE = "against torch.compile(max-autotune)"


def _about(workload: str, *figures: tuple) -> tuple[Target, ...]:
    """Targets of one workload on a GPU: (figure, value, mark, goal[, unit[, higher]])."""
    return tuple(Target("cuda", workload, *figure) for figure in figures)


_GPU = (
    *_about(
        "latency, base, B1 S128, CUDA graphs",
        ("against eager", _speedup("latency", EAGER, **_B1_GRAPHS), 10, 14),
        ("against sdpa", _speedup("latency", BASELINE, **_B1_GRAPHS), 8, 8),
        (_MAX_AUTOTUNE, _speedup("latency", COMPILED, **_B1_GRAPHS), 1.2, 1.2),
        ("wall time", _of("latency", _milliseconds, **_B1_GRAPHS), 0.40, 0.28, " ms", False),
        (
            "wall over GPU time",
            _of("latency", _wall_over_device, **_B1_GRAPHS),
            1.05,
            1.05,
            "x",
            False,
        ),
    ),
    *_about(
        "latency, large, B1 S128, CUDA graphs",
        ("wall time", _of("latency", _milliseconds, **_LARGE_B1_GRAPHS), 0.80, 0.60, " ms", False),
    ),
    *_about(
        "throughput, base, B64 S512",
        ("against eager", _speedup("throughput", EAGER, **_DENSE), 2.3, 2.3),
        ("against sdpa", _speedup("throughput", BASELINE, **_DENSE), 1.5, 1.5),
        (_MAX_AUTOTUNE, _speedup("throughput", COMPILED, **_DENSE), 1.15, 1.15),
        ("wall time", _of("throughput", _milliseconds, **_DENSE), 11.8, 10.7, " ms", False),
    ),
    *_about(
        "ragged, base, B64 S512, half full",
        ("against sdpa, padded", _speedup("ragged", BASELINE, **_HALF), 3, 4),
        ("useful tokens/s of the dense rate", _token_rate_of_dense, 95, 99, " %"),
        ("against its own padded path", _speedup("ragged", OWN_PADDED, **_HALF), 1.9, 1.9),
    ),
    *_about(
        "SQuAD-like lengths, large, B64 S384",
        ("sequences per second", _of("ragged", _sequences, **_LARGE_SQUAD), 5200, 6000, "/s"),
    ),
    *_about(
        "training step, base, B32 S512",
        ("against sdpa", _speedup("training step", BASELINE, **_TRAIN), 1.6, 2.0),
        ("against torch.compile", _speedup("training step", COMPILED, **_TRAIN), 1.25, 1.25),
        ("peak memory, of sdpa's", _memory_ratio, 0.60, 0.50, "x", False),
    ),
    *_about(
        "training step, base, B32 S512, half full",
        ("against sdpa", _speedup("training step", BASELINE, **_TRAIN_HALF), 2.8, 3.5),
        ("useful tokens/s", _of("training step", _tokens, **_TRAIN_HALF), 600e3, 700e3, "/s"),
    ),
    _attention("forward", 512, 375, 420),
    _attention("forward", 1024, 400, None),
    _attention("forward", 2048, None, 460),
    *(
        Target(
            "cuda",
            f"attention forward, D64, S{s}",
            "against the best sdpa backend",
            _over_best_sdpa(s),
            1.3,
            1.3,
        )
        for s in (128, 256)
    ),
    *_about(
        "attention forward, half full", ("rate, of the dense one", _varlen_of_dense, 97, 99, " %")
    ),
    _attention("backward", 512, 272, None),
    _attention("backward", 1024, 330, None),
    _attention("backward", 2048, None, 422),
    *_about(  # no workload measures dropout yet
        "attention dropout", ("share of the kernel's time", lambda r: None, 15, 8, " %", False)
    ),
    *(_rows("layer norm forward", 90, 95, M=32768, N=n, residual=True) for n in (768, 1024)),
    *(
        _against_compile("layer norm forward", 1.3, M=32768, N=n, residual=True)
        for n in (768, 1024)
    ),
    *(_rows("layer norm backward", 75, 88, M=32768, N=n) for n in (768, 1024)),
    *(_rows("softmax forward", 88, 95, M=98304, N=n) for n in (128, 512, 1024)),
    *(_against_compile("softmax forward", 1.5, M=98304, N=n) for n in (128, 512, 1024)),
    *_about(
        "linear + GELU, 32768x3072x768",
        (
            "against cuBLAS and a GELU pass",
            _speedup("linear + GELU forward", TORCH_EAGER, M=32768, N=3072, K=768),
            1.10,
            1.2,
        ),
    ),
)
TARGETS = (*_CPU, *_GPU)
