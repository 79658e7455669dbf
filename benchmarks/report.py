"""Reports of a result file: Markdown to paste, and one HTML page with plots to look at.

Everything shown comes from the file; what was not measured is listed with its reason. The page
carries its plots as SVG and loads nothing.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .page import document, table_of
from .plots import figures
from .results import Measurement, Results, quantiles
from .targets import Judged, judge
from .workload import OURS

__all__ = ["TARGET_HEADER", "markdown", "measured_rows", "page", "target_rows", "write_reports"]

_STATUS_TEXT = {
    "pass": "reached",
    "between": "between mark and goal",
    "below": "below the mark",
    "not measured": "not measured",
}


def write_reports(results: Results, folder: Path) -> None:
    """``report.md`` and ``report.html`` beside the result file."""
    (folder / "report.md").write_text(markdown(results), "utf-8")
    (folder / "report.html").write_text(page(results), "utf-8")


def _seconds_text(seconds: float) -> str:
    """Three significant digits with a unit that fits."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _where(machine: dict[str, Any]) -> str:
    versions = ", ".join(
        f"{name} {machine[name]}"
        for name in ("torch", "triton", "transformers", "onnxruntime", "openvino", "ctranslate2")
        if machine.get(name)
    )
    name = machine["device"]
    if machine["kind"] == "cpu":
        name += f", {machine['instruction_set']}, {machine['threads']} threads"
    return f"{name}; {versions}"


def _commit(machine: dict[str, Any]) -> str:
    if not machine.get("commit"):
        return "no checkout"
    return machine["commit"][:12] + (" with uncommitted changes" if machine["dirty"] else "")


def target_rows(judged: Iterable[Judged]) -> list[tuple[str, ...]]:
    return [
        (
            j.target.workload,
            j.target.figure,
            _value(j, j.value),
            _value(j, j.target.mark),
            _value(j, j.target.goal),
            "goal not reached"
            if j.status == "between" and j.target.mark is None
            else _STATUS_TEXT[j.status],
        )
        for j in judged
    ]


def _value(judged: Judged, value: float | None) -> str:
    if value is None:
        return "-"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{text}{judged.target.unit}"


TARGET_HEADER = ("workload", "figure", "measured", "mark", "goal", "result")
MEASURED_HEADER = (
    "provider", "median", "20 to 80 %", "against reference", "real tokens/s", "TFLOP/s", "GB/s",
    "of the limit here", "peak memory", "error / allowed",
)  # fmt: skip


def measured_rows(results: Results, group: list[Measurement]) -> list[tuple[str, ...]]:
    """One line per provider of a workload, the fastest first."""
    reference = next((m for m in group if m.provider == m.reference), None)
    rows = []
    for m in sorted(group, key=lambda m: m.seconds):
        p20, median, p80 = quantiles(m.times)
        ratio = None if reference is None else m.speedup_over(reference)
        share = results.share_of_limit(m)
        rows.append(
            (
                m.provider,
                _seconds_text(median),
                f"{_seconds_text(p20)} to {_seconds_text(p80)}",
                "-" if ratio is None else f"{ratio:.2f}x",
                f"{m.tokens_per_second:,.0f}",
                "-" if not m.tflops else f"{m.tflops:.3g}",
                "-" if m.gbs is None or m.level == "model" else f"{m.gbs:.3g}",
                results.beyond_limit(m) or "-" if share is None else f"{100 * share:.0f} %",
                "-" if m.peak_memory is None else f"{m.peak_memory / 2**20:,.0f} MiB",
                f"{m.check.error:.1e} / {m.check.budget:.1e}",
            )
        )
    return rows


def _limits_text(limits: dict[str, float]) -> str:
    if not limits:
        return "not measured"
    parts = []
    for name, value in limits.items():
        if name.startswith("datasheet_"):
            continue
        unit = "GB/s" if name.endswith("gbs") else "TFLOP/s"
        sheet = limits.get(f"datasheet_{name}")
        what = name.removesuffix("_gbs").replace("matmul_tflops_", "matmul ")
        parts.append(f"{what} {value:g} {unit}" + (f" (data sheet {sheet:g})" if sheet else ""))
    return ", ".join(parts)


def _disturbed_text(results: Results) -> str:
    """Which workloads were timed while something else ran; empty if none was."""
    names = {m.workload: m.pace for m in results.measurements if m.disturbed}
    if not names:
        return ""
    listed = ", ".join(f"{name} ({pace:.2f}x)" for name, pace in names.items())
    return (
        "Disturbed: a fixed product took longer than at its best, by the factor given, "
        f"around these workloads; take their figures with care. {listed}."
    )


def _not_measured_rows(results: Results) -> list[tuple[str, ...]]:
    """Reasons with what they concern, instead of one line each."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for n in results.not_measured:
        reasons.setdefault((n.provider, n.reason), []).append(n.workload)
    return [
        (provider, reason, names[0] if len(names) == 1 else f"{len(names)} workloads")
        for (provider, reason), names in reasons.items()
    ]


# ---- Markdown ----


def markdown(results: Results) -> str:
    """The whole file as Markdown."""
    m = results.machine
    parts = [
        "# fastbert benchmarks",
        f"{_where(m)}; fastbert {m['fastbert']}, commit {_commit(m)}; {m['date']}.",
        f"Limits measured in the same run: {_limits_text(results.limits)}. "
        f"Clock: {results.settings.get('clock', 'unknown')}. Ratios are medians over rounds in "
        "which all providers of a workload ran in turn; every provider was compared with fp64 "
        "before it was timed; throughput counts real tokens.",
    ]
    if disturbed := _disturbed_text(results):
        parts.append(disturbed)
    if results.failures:
        parts.append("## Wrong results")
        parts.append("\n".join(f"- {n.workload}: {n.reason}" for n in results.failures))
    judged = judge(results)
    if any(j.value is not None for j in judged):
        parts += ["## Targets", _markdown_table(TARGET_HEADER, target_rows(judged))]
    parts.append("## Measurements")
    for name, group in results.by_workload():
        parts += [f"### {name}", _markdown_table(MEASURED_HEADER, measured_rows(results, group))]
    if results.not_measured:
        header = ("provider", "why", "where")
        parts += ["## Not measured", _markdown_table(header, _not_measured_rows(results))]
    return "\n\n".join(parts) + "\n"


def _markdown_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in r) + " |" for r in lines)


# ---- HTML ----


def page(results: Results) -> str:
    """One HTML page: headline figures, targets, plots, and all tables folded below."""
    m, judged = results.machine, judge(results)
    parts = [
        "<h1>fastbert benchmarks</h1>",
        f'<p class="where">{html.escape(_where(m))}</p>',
        f'<p class="where">fastbert {html.escape(m["fastbert"])}, commit '
        f"{html.escape(_commit(m))}, {html.escape(m['date'])}. Limits measured in this run: "
        f"{html.escape(_limits_text(results.limits))}.</p>",
    ]
    if disturbed := _disturbed_text(results):
        parts.append(f'<p class="soft">{html.escape(disturbed)}</p>')
    if results.failures:
        items = "".join(
            f"<li>{html.escape(n.workload)}: {html.escape(n.reason)}</li>" for n in results.failures
        )
        parts.append(f'<div class="bad"><b>Wrong results, not timed</b><ul>{items}</ul></div>')
    parts.append(_cards(results, judged))
    if any(j.value is not None for j in judged):
        parts += ["<h2>Targets</h2>", _targets_table(judged)]
    parts += figures(results)
    parts.append("<h2>Every measurement</h2>")
    parts.append(
        '<p class="soft">Compared with fp64 before it was timed; providers of a workload ran in '
        f"turn; throughput counts real tokens. {html.escape(results.settings.get('clock', ''))}."
        "</p>"
    )
    for name, group in results.by_workload():
        table = table_of(MEASURED_HEADER, measured_rows(results, group))
        parts.append(f"<details><summary>{html.escape(name)}</summary>{table}</details>")
    if results.not_measured:
        parts.append("<h2>Not measured</h2>")
        parts.append(table_of(("provider", "why", "where"), _not_measured_rows(results)))
    return document(f"fastbert benchmarks, {m['device']}", parts)


def _cards(results: Results, judged: list[Judged]) -> str:
    cards = []
    for op, what in (
        ("latency", "one text at a time"),
        ("throughput", "full batches"),
        ("ragged", "batches of mixed length"),
        ("training step", "a training step"),
        ("encode", "texts to embeddings"),
    ):
        pairs = [
            (m.speedup_over(reference), m)
            for m in results.measurements
            if m.op == op and m.provider == OURS
            and (reference := results.find(op, m.reference, m.dtype, **m.params)) is not None
        ]  # fmt: skip
        if pairs:
            ratios = [ratio for ratio, _ in pairs]
            shown = f"{min(ratios):.2f} to {max(ratios):.2f}" if len(pairs) > 1 else (
                f"{ratios[0]:.2f}"
            )  # fmt: skip
            against = html.escape(pairs[0][1].reference)
            cards.append(
                f'<div class="card"><b>{shown}x</b>{what}, against {against} '
                f'<span class="soft">({len(pairs)} shape{"s" * (len(pairs) > 1)})</span></div>'
            )
    known = [j for j in judged if j.value is not None]
    if known:
        passed = sum(j.status == "pass" for j in known)
        cards.append(
            f'<div class="card"><b>{passed} of {len(known)}</b>targets reached '
            f'<span class="soft">({sum(j.status == "below" for j in known)} below the mark)</span>'
            "</div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _targets_table(judged: list[Judged]) -> str:
    rows = []
    for j, cells in zip(judged, target_rows(judged), strict=True):
        css = {"not measured": "none"}.get(j.status, j.status)
        chip = f'<span class="chip {css}">{html.escape(cells[-1])}</span>'
        plain = "".join(f'<td class="num">{html.escape(c)}</td>' for c in cells[:-1])
        rows.append(f"<tr>{plain}<td>{chip}</td></tr>")
    head = "".join(f"<th>{h}</th>" for h in TARGET_HEADER)
    return f'<div class="table"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
