"""An HTML page of inspected variants: resources, occupancy, roofline and instruction mix."""

from __future__ import annotations

import html

from fastbert.benchmarks.page import document, figure_of_rows, legend, styled, svg_of, table_of

from .inspection import Inspection
from .sass import CLASSES

__all__ = ["HEADER", "page", "row"]

HEADER = (
    "variant", "registers", "stack", "spills", "shared", "programs/SM", "warps/SM", "occupancy",
    "limited by", "matrix", "instructions/element", "faults",
)  # fmt: skip
_COLOURS = dict(
    zip(
        CLASSES,
        ("#1f5fd0", "#d1802a", "#5b9a5b", "#c9b458", "#a05fb0", "#3a9c9c", "#c4504b", "#8a8f98",
         "#555b66", "#8c6d46", "#cfd3da"),
        strict=True,
    )
)  # fmt: skip


def row(found: Inspection) -> tuple[str, ...]:
    """One line of `HEADER`."""
    a, o = found.artefact, found.occupancy
    return (
        found.variant.name,
        str(a.registers),
        f"{a.stack} B",
        f"{a.spill_stores + a.spill_loads} B",
        f"{a.shared / 1024:.1f} KiB",
        str(o.programs),
        str(o.warps),
        f"{100 * o.share:.0f} %",
        o.limit,
        found.matrix_instructions,
        f"{sum(found.per_element.values()):.3g} per {found.variant.element}",
        "; ".join(found.faults) or "none",
    )


def _occupancy_plot(found: list[Inspection]) -> str:
    figure, axis = figure_of_rows(len(found))
    for y, i in enumerate(reversed(found)):
        axis.barh(y, 100 * i.occupancy.share, color="#1f5fd0", height=0.66, zorder=3)
        text = f"{i.occupancy.programs} x {i.variant.num_warps} warps, {i.occupancy.limit}"
        axis.annotate(text, (100 * i.occupancy.share, y), va="center", fontsize=7.5,
                      textcoords="offset points", xytext=(5, 0))  # fmt: skip
    _variant_axis(axis, found)
    axis.set_xlim(0, 125)
    axis.set_xlabel("resident warps, % of what a multiprocessor holds; what allows no more")
    return svg_of(figure)


def _mix_plot(found: list[Inspection]) -> str:
    figure, axis = figure_of_rows(len(found) + 3)
    for y, i in enumerate(reversed(found)):
        left = 0.0
        for name in CLASSES:
            value = i.per_element.get(name, 0.0)
            axis.barh(y, value, left=left, color=_COLOURS[name], height=0.66, zorder=3,
                      label=name if y == 0 else None)  # fmt: skip
            left += value
    _variant_axis(axis, found)
    axis.set_xlabel("thread instructions per element in the inner loop (or the whole program)")
    legend(figure)
    return svg_of(figure)


def _roofline_plot(found: list[Inspection]) -> str | None:
    """Where the examples lie under the data-sheet roofs of the cards of this architecture."""
    with_work = [i for i in found if i.variant.cost.flops]
    cards = [card for card, *_ in found[0].rooflines()]
    if not with_work or not cards:
        return None
    figure, axis = figure_of_rows(14)
    for card in cards:
        ridge = 1e3 * card.matmul_16bit / card.bandwidth
        xs = [ridge / 64, ridge, ridge * 16]
        axis.plot(xs, [card.matmul_16bit / 64, *(card.matmul_16bit,) * 2], label=card.name)
    for i in with_work:
        x = i.variant.cost.intensity
        axis.axvline(x, color="#8a8f98", linewidth=0.8, linestyle="--")
    labels = sorted({(i.variant.cost.intensity, i.variant.example) for i in with_work})
    for x, example in labels[:6]:
        axis.annotate(example, (x, 0.02), xycoords=("data", "axes fraction"), rotation=90,
                      fontsize=7, ha="right", va="bottom")  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations per byte of the examples (dashed)")
    axis.set_ylabel("16-bit TFLOP/s by data sheet")
    legend(figure)
    return svg_of(figure)


def _variant_axis(axis, found: list[Inspection]) -> None:
    names = [i.variant.name.partition(" ")[2] for i in reversed(found)]
    axis.set_yticks(range(len(found)), names, fontsize=7.5)
    axis.grid(axis="y", visible=False)


@styled
def page(found: list[Inspection]) -> str:
    """One self-contained HTML page.

    Raises:
        ValueError: nothing to show.
    """
    if not found:
        raise ValueError("report: expected inspected variants, got none")
    kernel, arch = found[0].variant.kernel.__name__.strip("_"), found[0].variant.arch
    roofs = [
        (i.variant.name, i.variant.example, card.name, f"{1e6 * seconds:.1f} us", bound)
        for i in found
        for card, seconds, bound in i.rooflines()
    ]
    warnings = [(i.variant.name, w) for i in found for w in i.artefact.warnings]
    parts = [
        f"<h1>{html.escape(kernel)}, sm_{arch}</h1>",
        '<p class="where">Compiled ahead of time; registers and stack by cuobjdump, instructions '
        "by nvdisasm, spills and warnings by ptxas. Nothing here was timed.</p>",
        "<h2>Resources</h2>",
        table_of(HEADER, [row(i) for i in found]),
        f"<h2>Occupancy</h2><figure>{_occupancy_plot(found)}</figure>",
        f"<h2>Instruction mix</h2><figure>{_mix_plot(found)}</figure>",
    ]
    roofline = _roofline_plot(found)
    if roofline:
        parts.append(f"<h2>Roofline</h2><figure>{roofline}</figure>")
    if roofs:
        header = ("variant", "example", "card", "least time", "bound by")
        parts += ["<h2>Least times by data sheet</h2>", table_of(header, roofs)]
    if warnings:
        parts += ["<h2>Warnings of ptxas</h2>", table_of(("variant", "warning"), warnings)]
    return document(f"{kernel}, sm_{arch}", parts)
