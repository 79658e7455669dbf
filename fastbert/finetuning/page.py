"""A run as one page: the verdict, losses and metric by step, classes, what is taken for what."""

from __future__ import annotations

import html
from typing import Any

import numpy as np

from ..benchmarks.page import document, figure_of_panels, legend, styled, svg_of, table_of
from .report import DataReport, Verdict

__all__ = ["page_of"]

_TRAIN, _DEV, _BEST = "#8a8f98", "#1f5fd0", "#c4504b"
_SMOOTH = 10  # steps that a point of the training loss is the mean of
_MOST = 30  # classes of a confusion matrix that can be read


def page_of(
    title: str,
    labels: list[str],
    report: DataReport,
    verdict: Verdict,
    metrics: list[dict[str, Any]],
    confusion: np.ndarray | None,
) -> str:
    """The page, which loads nothing.

    Args:
        labels: names of the classes.
        metrics: of all steps and evaluations.
        confusion: ``[C, C]``, how often a class (row) was taken for another (column); None where
            that makes no sense.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="where">{html.escape(str(verdict))}</p>']
    if verdict.overfits:
        step, best, last = verdict.overfits
        parts.append(
            f'<p class="bad">Over-fitted: behind step {step:,} the loss on dev rose from '
            f"{best:.3f} to {last:.3f}, while that of training fell.</p>"
        )
    parts += ["<h2>Training</h2>", f"<figure>{_curves(metrics, verdict)}</figure>"]
    if verdict.by_class:
        rows = [
            (str(row["class"]), *(f"{row[name]:.3f}" for name in ("precision", "recall", "f1")),
             f"{row['rows']:,}")
            for row in verdict.by_class
        ]  # fmt: skip
        parts += ["<h2>Classes</h2>", table_of(("", "precision", "recall", "F1", "rows"), rows)]
    if confusion is not None and len(confusion) <= _MOST:
        caption = "Rows are what is right, columns what was said."
        parts += [
            "<h2>What is taken for what</h2>",
            f"<figure>{_matrix(confusion, labels)}<figcaption>{caption}</figcaption></figure>",
        ]
    parts += ["<h2>Data</h2>", table_of(("", ""), report.lines())]
    return document(title, parts)


@styled
def _curves(metrics: list[dict[str, Any]], verdict: Verdict) -> str:
    figure, (losses, scores) = figure_of_panels(2)
    trained = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    dev = [line for line in metrics if "eval_loss" in line]
    steps, values = np.array(trained, dtype=float).reshape(-1, 2).T
    width = min(_SMOOTH, max(len(values), 1))
    smooth = np.convolve(values, np.full(width, 1 / width), "valid")
    losses.plot(steps[width - 1 :], smooth, color=_TRAIN, label=f"training, mean of {width} steps")
    at = [line["step"] for line in dev]
    losses.plot(at, [line["eval_loss"] for line in dev], "o-", color=_DEV, label="dev")
    name = verdict.metric
    scores.plot(at, [line[f"eval_{name}"] for line in dev], "o-", color=_DEV, label="dev")
    for axis, what in ((losses, "loss"), (scores, name)):
        axis.axvline(verdict.best_step, color=_BEST, linestyle="--", label="best model")
        axis.set_xlabel("step")
        axis.set_ylabel(what)
    legend(figure)
    return svg_of(figure)


@styled
def _matrix(confusion: np.ndarray, labels: list[str]) -> str:
    size = 2.4 + 0.42 * len(labels)
    figure, (axis,) = figure_of_panels(width=size, height=size)
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.grid(False)
    places = range(len(labels))
    axis.set_xticks(places, labels, rotation=90)
    axis.set_yticks(places, labels)
    for row, column in np.argwhere(confusion > 0):
        colour = "white" if shares[row, column] > 0.5 else "black"
        count = f"{confusion[row, column]:,}"
        axis.text(column, row, count, ha="center", va="center", color=colour, fontsize=8)
    return svg_of(figure)
