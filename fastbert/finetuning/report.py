"""What fine-tuning tells of the data before, and of the model behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .table import Splits, Table

# Columns by which two rows are the same.
_CONTENT = ("text", "text_a", "text_b", "tokens", "question", "context", "choices",
            "query", "passage", "negative")  # fmt: skip

__all__ = ["DataReport", "Verdict", "by_class_lines", "report_on"]


class DataReport(NamedTuple):
    """What is known of the data before anything is trained.

    Attributes:
        task: its name.
        rows: of each split.
        labels: how often training has each, most first; of a regression nothing.
        unseen: labels of the other splits that training has not.
        lengths: tokens of an example: the median, 95 % of them, the longest.
        cut: rows of each split that are longer than ``--max-length``.
        duplicates: rows of training that came before.
        shared: rows of dev and test that training has too.
        metric: what the model is chosen by.
        baseline: how good it is to say the same always, on dev: what is said, and the metric.
        untrained: the metric of the model before it is trained.
        remarks: what else there is to say of the rows, by split.
    """

    task: str
    rows: dict[str, int]
    labels: dict[str, int]
    unseen: tuple[str, ...]
    lengths: tuple[int, int, int]
    cut: dict[str, int]
    duplicates: int
    shared: dict[str, int]
    metric: str
    baseline: tuple[str, float]
    untrained: float
    remarks: dict[str, list[str]]

    def lines(self) -> Iterator[tuple[str, str]]:
        """What is told, with its name."""
        yield "task", f"{self.task}, by {self.metric}"
        yield "rows", ", ".join(f"{count:,} {name}" for name, count in self.rows.items())
        if self.labels:
            total = sum(self.labels.values())
            shown = [f"{k} {v / total:.1%}" for k, v in list(self.labels.items())[:10]]
            more = [f"{len(self.labels) - 10} more"] if len(self.labels) > 10 else []
            yield "labels", ", ".join([*shown, *more])
        if self.unseen:
            yield "not trained", f"labels that no row to train on has: {', '.join(self.unseen)}"
        median, most, longest = self.lengths
        yield (
            "tokens",
            f"{median} in the middle row, at most {most} in 95 %, {longest} in the longest",
        )
        for name, count in self.cut.items():
            if count:
                yield "cut", f"{count:,} rows of {name} are longer than --max-length"
        if self.duplicates:
            yield "duplicates", f"{self.duplicates:,} rows to train on came before"
        for name, count in self.shared.items():
            if count:
                yield "leak", f"{count:,} rows of {name} are to be trained on too"
        for name, remarks in self.remarks.items():
            for remark in remarks:
                yield name, remark
        said, value = self.baseline
        yield "before", f"{value:.3f} {said}, {self.untrained:.3f} this model untrained (on dev)"


def report_on(
    splits: Splits,
    *,
    labels: dict[str, Counter[str]],
    lengths: list[int],
    remarks: dict[str, list[str]],
    **known: Any,
) -> DataReport:
    """The report.

    Args:
        labels: how often each split has which.
        lengths: tokens of the examples to train on.
        remarks, known: as `DataReport`.
    """
    named = {name: table for name, table in splits._asdict().items() if table is not None}
    trained = labels["train"]
    seen = [_content(row) for row in _contents(splits.train)]
    distinct = set(seen)
    return DataReport(
        rows={name: len(table) for name, table in named.items()},
        labels=dict(trained.most_common()),
        unseen=tuple(sorted(set().union(*labels.values()) - set(trained))),
        lengths=tuple(int(np.quantile(lengths, q, method="lower")) for q in (0.5, 0.95, 1.0)),
        duplicates=len(seen) - len(distinct),
        shared={
            name: sum(_content(row) in distinct for row in _contents(table))
            for name, table in named.items()
            if name != "train"
        },
        remarks={name: remarks.get(name, []) for name in named},
        **known,
    )


def _contents(table: Table) -> list[tuple[Any, ...]]:
    names = [name for name in _CONTENT if name in table.columns]
    return table.rows(names)


def _content(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tuple(value) if isinstance(value, list) else value for value in row)


class Verdict(NamedTuple):
    """What a run has come to.

    Attributes:
        split: what it is scored on, ``"test"`` or ``"dev"``.
        rows: of it.
        metric: what the model was chosen by.
        scores: of the best model; ``baseline``: of saying the same always, with what is said;
            ``untrained``: before training, on dev.
        by_class: precision, recall, F1 and rows of each class.
        steps: that were trained; ``best_step``: behind which the best model was found.
        overfits: step of the lowest loss on dev, that loss and the last one, where dev got worse
            behind it while training got better.
        overhead: share of the time that the model did not take; None where nothing was trained.
    """

    split: str
    rows: int
    metric: str
    scores: dict[str, float]
    baseline: tuple[str, float]
    untrained: float
    by_class: list[dict[str, Any]]
    steps: int
    best_step: int
    overfits: tuple[int, float, float] | None
    overhead: float | None

    def __str__(self) -> str:
        said, value = self.baseline
        return (
            f"{self.metric} {self.scores[self.metric]:.3f} on {self.rows:,} {self.split} rows, "
            f"against {value:.3f} {said} and {self.untrained:.3f} untrained; best of "
            f"{self.steps:,} steps: {self.best_step:,}"
        )

    def lines(self) -> Iterator[str]:
        """Other metrics, a table by class, and whether it learned the rows by heart."""
        yield ", ".join(f"{name} {value:.3f}" for name, value in self.scores.items())
        yield from by_class_lines(self.by_class)
        if self.overfits:
            step, best, last = self.overfits
            yield (
                f"over-fitted: behind step {step:,} the loss on dev rose from {best:.3f} to "
                f"{last:.3f}, while that of training fell"
            )


def by_class_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A table of precision, recall, F1 and rows; nothing where there are no classes."""
    if not rows:
        return
    width = max(len(str(row["class"])) for row in rows)
    yield f"{'':{width}}  precision  recall      f1    rows"
    for row in rows:
        yield (
            f"{row['class']:{width}}  {row['precision']:9.3f}  {row['recall']:6.3f}  "
            f"{row['f1']:6.3f}  {row['rows']:6,}"
        )
