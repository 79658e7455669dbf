"""Reports of a result file: Markdown to paste, and one HTML page with plots to look at.

Everything shown comes from the file; what was not measured is listed with its reason. The page
carries its plots as SVG and loads nothing.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .encoders import BASELINE
from .page import (
    document,
    figure_of_panels,
    figure_of_rows,
    legend,
    styled,
    svg_of,
    table_of,
)
from .results import Measurement, Results, quantiles
from .shapes import draw_lengths, fill_of
from .targets import Judged, judge
from .workload import OURS

__all__ = ["TARGET_HEADER", "markdown", "measured_rows", "page", "target_rows", "write_reports"]

# Blue for ours and greys and warm tones for others: readable without colour by markers too.
_COLOURS = ("#8a8f98", "#d1802a", "#5b9a5b", "#a05fb0", "#c4504b", "#3a9c9c", "#8c6d46", "#555b66")
_OURS_COLOUR = "#1f5fd0"
_MARKERS = "sD^vP*X<"
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


# ---- plots ----


class _Style:
    """The same colour and marker for a provider in every plot of a page."""

    def __init__(self, results: Results):
        others = dict.fromkeys(m.provider for m in results.measurements if m.provider != OURS)
        self._of = {OURS: (_OURS_COLOUR, "o", 2.4)}
        for i, name in enumerate(others):
            marker = _MARKERS[i % len(_MARKERS)]
            self._of[name] = (_COLOURS[i % len(_COLOURS)], marker, 1.4)

    def line(self, provider: str) -> dict[str, Any]:
        colour, marker, width = self._of[provider]
        return {
            "color": colour, "marker": marker, "linewidth": width, "markersize": 5,
            "label": provider, "zorder": 5 if provider == OURS else 3,
        }  # fmt: skip

    def point(self, provider: str) -> dict[str, Any]:
        colour, marker, _ = self._of[provider]
        return {"color": colour, "marker": marker, "s": 34, "zorder": 5 if provider == OURS else 3}

    def colour(self, provider: str) -> str:
        return self._of[provider][0]


def _millisecond_axis(axis) -> None:
    from matplotlib.ticker import LogLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(lambda y, _: f"{1e3 * y:g}")
    axis.yaxis.set_minor_formatter(lambda y, _: "")
    axis.set_ylabel("milliseconds, median and 20 to 80 %")


def _time_plot(results: Results, style: _Style, op_names: tuple[str, ...], letter: str, title: str):
    """Time against a size, one panel per model, for models measured at two sizes or more."""
    panels: dict[str, dict[str, list[Measurement]]] = {}
    for m in results.measurements:
        fixed = m.params.get("S") == 128 if letter == "B" else m.params.get("B") == 1
        if m.op in op_names and m.params.get("model") and fixed:
            panels.setdefault(m.params["model"], {}).setdefault(m.provider, []).append(m)
    panels = {
        model: lines
        for model, lines in panels.items()
        if len({m.params[letter] for ms in lines.values() for m in ms}) > 1
    }
    if not panels:
        return None
    figure, axes = figure_of_panels(len(panels))
    for axis, (model, lines) in zip(axes, panels.items(), strict=True):
        for provider, ms in lines.items():
            ms.sort(key=lambda m: m.params[letter])
            sizes = [m.params[letter] for m in ms]
            low, median, high = zip(*(quantiles(m.times) for m in ms), strict=True)
            axis.plot(sizes, median, **style.line(provider))
            axis.fill_between(sizes, low, high, color=style.colour(provider), alpha=0.12)
        ticks = sorted({m.params[letter] for ms in lines.values() for m in ms})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.set_xlabel({"S": "tokens in the sequence", "B": "sequences of 128 tokens"}[letter])
        axis.set_title(f"{model}: {title}")
        _millisecond_axis(axis)
    legend(figure)
    return svg_of(figure)


def _ragged_plot(results: Results, style: _Style):
    """Speed-up over padded sdpa against fill, with 1 / fill: what not computing padding gives."""
    panels: dict[str, list[tuple[float, float, str, str]]] = {}
    for m in results.measurements:
        if m.op != "ragged" or m.provider == m.reference:
            continue
        sdpa = results.find(m.op, m.reference, m.dtype, **m.params)
        if sdpa is None:
            continue
        p = m.params
        fill = fill_of(draw_lengths(p["lengths"], p["B"], p["S"]))
        panels.setdefault(p["model"], []).append(
            (fill, m.speedup_over(sdpa), m.provider, p["lengths"])
        )
    if not panels:
        return None
    figure, axes = figure_of_panels(len(panels))
    for axis, (model, points) in zip(axes, panels.items(), strict=True):
        fills = [i / 100 for i in range(12, 101)]
        axis.plot(fills, [1 / f for f in fills], "--", color="#9aa0a8", label="1 / fill")
        axis.axhline(1.0, color="#9aa0a8", linewidth=0.8)
        for fill, ratio, provider, lengths in points:
            axis.scatter([fill], [ratio], label=provider, **style.point(provider))
            if provider == OURS:
                axis.annotate(
                    lengths, (fill, ratio), textcoords="offset points", xytext=(6, 5), fontsize=8
                )
        axis.set_ylim(0, 1.25 * max(ratio for _, ratio, *_ in points))
        axis.set_xlim(0.1, 1.02)
        axis.set_xlabel("fill: share of real tokens in the padded batch")
        axis.set_ylabel(f"times as fast as {BASELINE}")
        axis.set_title(f"{model}: ragged batches")
    legend(figure)
    return svg_of(figure)


def _matmul_limit(results: Results, dtype: str) -> float | None:
    return results.limits.get(f"matmul_tflops_{dtype}")


def _roofline_plot(results: Results, style: _Style):
    """Rate against arithmetic intensity of everything that has operations, under the two limits."""
    points = [m for m in results.measurements if m.level == "kernel" and m.flops]
    copy = results.limits.get("copy_gbs")
    if not points or not copy:
        return None
    figure, (axis,) = figure_of_panels(width=7.4, height=4.2)
    for dtype in dict.fromkeys(m.dtype for m in points):
        top = _matmul_limit(results, dtype)
        if top is None:
            continue
        ridge = 1e3 * top / copy
        xs = [ridge / 64, ridge, ridge * 16]
        axis.plot(xs, [top / 64, top, top], color="#3b4048", linewidth=1.2, zorder=2)
        axis.annotate(f"{dtype} matmul, {top:.3g} TFLOP/s", (xs[-1], top), ha="right",
                      textcoords="offset points", xytext=(0, 4), fontsize=8)  # fmt: skip
    for m in points:
        axis.scatter(
            [m.flops / m.bytes], [m.tflops], label=m.provider, alpha=0.85, **style.point(m.provider)
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations per byte (least traffic)")
    axis.set_ylabel("TFLOP/s")
    axis.set_title(f"Roofline: limits measured in this run (copy {copy:.3g} GB/s)")
    legend(figure)
    return svg_of(figure)


def _share_plot(results: Results, style: _Style):
    """Share of the limit for each operation: all shapes of an operation, and their median."""
    shares: dict[str, dict[str, list[float]]] = {}
    for m in results.measurements:
        share = results.share_of_limit(m) if m.level == "kernel" else None
        if share is not None:
            shares.setdefault(m.op, {}).setdefault(m.provider, []).append(share)
    if not shares:
        return None
    rows = [(op, p, v) for op, by in shares.items() for p, v in sorted(by.items())]
    figure, axis = figure_of_rows(len(rows))
    for i, (_, provider, values) in enumerate(rows):
        y, median = len(rows) - 1 - i, statistics.median(values)
        axis.barh(y, median, height=0.7, color=style.colour(provider), zorder=3)
        axis.scatter(values, [y] * len(values), s=7, color="#22262c", zorder=6)
        axis.annotate(f"{100 * median:.0f} %", (median, y), va="center", fontsize=7,
                      textcoords="offset points", xytext=(5, 0), zorder=7)  # fmt: skip
    axis.set_yticks(
        range(len(rows)),
        _grouped([(op, p) for op, p, _ in rows])[::-1],
        fontsize=7.5,
    )  # fmt: skip
    axis.set_xlim(0, max(1.0, 1.1 * max(max(v) for *_, v in rows)))
    axis.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g} %")
    axis.set_xlabel("share of the limit measured in this run (copy or matmul); dots are shapes")
    axis.grid(axis="y", visible=False)
    return svg_of(figure)


def _grouped(rows: list[tuple[str, str]]) -> list[str]:
    """Labels of (group, member), the group named once, at its first member."""
    return [
        member if i and rows[i - 1][0] == group else f"{group}:  {member}"
        for i, (group, member) in enumerate(rows)
    ]


def _memory_plot(results: Results, style: _Style):
    """Peak memory of model workloads; None where it was not measured."""
    groups = [
        (name, [m for m in group if m.peak_memory])
        for name, group in results.by_workload()
        if group[0].level == "model"
    ]
    groups = [(name, group) for name, group in groups if group][:10]
    if not groups:
        return None
    rows = [(name, m) for name, group in groups for m in group]
    figure, axis = figure_of_rows(len(rows))
    for i, (_, m) in enumerate(rows):
        axis.barh(
            len(rows) - 1 - i, m.peak_memory / 2**20, color=style.colour(m.provider), zorder=3
        )
    labels = _grouped([(name, m.provider) for name, m in rows])
    axis.set_yticks(range(len(rows)), labels[::-1], fontsize=7.5)
    axis.set_xlabel("MiB on top of weights and inputs")
    axis.grid(axis="y", visible=False)
    return svg_of(figure)


# ---- HTML ----


def page(results: Results) -> str:
    """One HTML page: headline figures, targets, plots, and all tables folded below."""
    m, style, judged = results.machine, _Style(results), judge(results)
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
    parts += _plots(results, style)
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


@styled
def _plots(results: Results, style: _Style) -> list[str]:
    made = (
        ("Ragged batches", _ragged_plot(results, style),
         "Above the dashed line is more than skipping padding alone can give."),
        ("Time against length", _time_plot(results, style, ("latency",), "S", "one sequence"), ""),
        ("Time against batch",
         _time_plot(results, style, ("latency", "throughput"), "B", "batches"), ""),
        ("Roofline", _roofline_plot(results, style),
         "Operations are those of the products alone; bytes count each operand once."),
        ("Single operations", _share_plot(results, style),
         "How close each operation comes to what this machine did at most in this run. More than "
         "100 % of the copy rate means that operands stayed in a cache."),
        ("Memory", _memory_plot(results, style), ""),
    )  # fmt: skip
    parts = []
    for title, svg, caption in made:
        if svg is None and title == "Memory":
            parts.append(f'<h2>{title}</h2><p class="soft">Not measured: it needs a GPU.</p>')
        elif svg is not None:
            caption = f"<figcaption>{caption}</figcaption>" if caption else ""
            parts.append(f"<h2>{title}</h2>\n<figure>{svg}{caption}</figure>")
    return parts
