"""Plots of a result file as SVG: time against size, ragged batches, roofline, shares, memory."""

from __future__ import annotations

import statistics
from typing import Any

from .encoders import BASELINE
from .page import figure_of_panels, figure_of_rows, legend, styled, svg_of
from .results import Measurement, Results, quantiles
from .shapes import draw_lengths, fill_of
from .workload import OURS

__all__ = ["figures"]

# Blue for ours and greys and warm tones for others: readable without colour by markers too.
_COLOURS = ("#8a8f98", "#d1802a", "#5b9a5b", "#a05fb0", "#c4504b", "#3a9c9c", "#8c6d46", "#555b66")
_OURS_COLOUR = "#1f5fd0"
_MARKERS = "sD^vP*X<"


@styled
def figures(results: Results) -> list[str]:
    """Every plot that the results allow, as HTML with its title; what is missing is said."""
    style = _Style(results)
    made = (
        ("Ragged batches", _ragged_plot(results, style),
         "Above the dashed line is more than skipping padding alone can give."),
        ("Time against length", _time_plot(results, style, ("latency",), "S", "one sequence"), ""),
        ("Time against batch",
         _time_plot(results, style, ("latency", "throughput"), "B", "batches"), ""),
        ("Roofline", _roofline_plot(results, style),
         "Operations are those of the products alone; bytes count each operand once."),
        ("Single operations", _share_plot(results, style),
         "How close each operation comes to what this machine did at most in this run. Operations "
         "whose operands stayed in a cache are left out: no copy limits them."),
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
