"""What HTML reports share: their style, SVG figures, tables. A page loads nothing."""

from __future__ import annotations

import functools
import html
import io
from collections.abc import Callable, Iterable
from typing import Any

__all__ = [
    "document",
    "figure_of_panels",
    "figure_of_rows",
    "legend",
    "styled",
    "svg_of",
    "table_of",
]

_CSS = """
:root { --ink:#1c2027; --soft:#5d6570; --line:#e2e5ea; --blue:#1f5fd0; --back:#f6f7f9; }
* { box-sizing:border-box }
body { margin:0; background:var(--back); color:var(--ink);
       font:15px/1.5 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif }
main { max-width:1120px; margin:0 auto; padding:36px 24px 80px }
h1 { font-size:30px; margin:0 0 4px; letter-spacing:-.02em }
h2 { font-size:20px; margin:44px 0 12px }
p.where, .soft { color:var(--soft); margin:2px 0 }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(200px,1fr)); gap:14px;
         margin:26px 0 }
.card, figure, .table { background:#fff; border:1px solid var(--line); border-radius:12px }
.card { padding:16px 18px } .card b { display:block; font-size:32px; line-height:1.15;
        color:var(--blue); letter-spacing:-.02em }
figure { margin:0 0 16px; padding:16px 18px }
figure svg { display:block; max-width:100%; height:auto; margin:0 auto }
figcaption { color:var(--soft); font-size:13.5px; margin-top:6px }
.table { overflow-x:auto; margin-bottom:16px }
table { border-collapse:collapse; width:100%; font-size:13.5px }
th, td { padding:7px 12px; text-align:left; border-bottom:1px solid var(--line);
         white-space:nowrap } td.wide { white-space:normal }
tr:last-child td { border-bottom:0 } th { color:var(--soft); font-weight:600 }
td.num { font-variant-numeric:tabular-nums } tr.ours td { font-weight:600; color:var(--blue) }
.chip { padding:2px 9px; border-radius:99px; font-size:12.5px; font-weight:600 }
.pass { background:#dff3e4; color:#17693a } .between { background:#fdf0cf; color:#7a5200 }
.below { background:#fbdedb; color:#96201a } .none { background:#e9ebef; color:#5d6570 }
details { margin-bottom:8px } summary { cursor:pointer; padding:6px 0; font-weight:600 }
.bad { background:#fbdedb; border:1px solid #e5a49f; border-radius:12px; padding:12px 18px }
@media print { body { background:#fff } details { display:block } }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """A self-contained page."""
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_CSS}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


_FIGURE_STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8ec",
    "axes.edgecolor": "#9aa0a8",
    "axes.titleweight": "bold",
    "axes.titlesize": 10,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "fastbert",
}


def styled(plot: Callable) -> Callable:
    """Run a function that draws with the style of these pages; that of the process stays."""

    @functools.wraps(plot)
    def run(*args, **kwargs):
        import matplotlib

        with matplotlib.rc_context(_FIGURE_STYLE):
            return plot(*args, **kwargs)

    return run


def figure_of_panels(columns: int = 1, *, width: float = 4.9, height: float = 3.6):
    """A matplotlib figure with axes side by side; sizes are inches, the width of one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def figure_of_rows(rows: int):
    """A figure with one axis for so many horizontal bars."""
    figure, (axis,) = figure_of_panels(width=9.0, height=0.9 + 0.22 * rows)
    return figure, axis


def legend(figure) -> None:
    """Each label once, above the panels, where it covers nothing."""
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    columns = max(1, min(len(handles), int(figure.get_figwidth() // 1.8)))
    figure.legend(
        handles.values(), handles.keys(), fontsize=8, loc="outside upper center", ncols=columns
    )


def svg_of(figure) -> str:
    """The figure as an SVG element; the same figure gives the same text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def table_of(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table; a row whose first cell is ``fastbert`` stands out."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join(
        f'<tr class="{"ours" if r[0] == "fastbert" else ""}">'
        + "".join(
            f'<td class="{"wide" if len(c) > 60 else "num"}">{html.escape(c)}</td>' for c in r
        )
        + "</tr>"
        for r in rows
    )
    return f'<div class="table"><table><tr>{head}</tr>{body}</table></div>'
