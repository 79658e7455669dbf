"""What is said of a whole text, or of a pair: one class, several labels, a number."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from ..tasks.errors import InputError
from .table import Table
from .tasks import Example, Task, log_softmax

__all__ = ["Classification", "MultiLabel", "Regression"]


class Classification(Task):
    """One of several classes for a text, or for a pair of texts."""

    name, best = "classification", "accuracy"
    _weights: Tensor | None = None
    _smoothing = 0.0

    @classmethod
    def of(cls, *tables: Table) -> Classification:
        names = [set(_one_by_one(_column(t, "label"), t, "label")) for t in tables]
        if len(names[0]) < 2:
            raise InputError(
                f"expected two classes or more in 'label' of {tables[0].name!r}, got "
                f"{names[0].pop()!r} in every row: there is nothing to tell apart"
            )
        return cls(_sorted(set.union(*names)))

    def gold(self, table: Table) -> list[int]:
        return self._indices(_one_by_one(_column(table, "label"), table, "label"), table)

    def weigh(self, table: Table, *, balance: bool, smoothing: float) -> None:
        """Change the loss of training.

        Args:
            balance: every class of ``table`` weighs as much as any other.
            smoothing: share of the target that is spread over all classes.
        """
        self.has_own_loss, self._smoothing = True, smoothing
        if balance:
            counts = np.bincount(self.gold(table), minlength=len(self.labels))
            weights = len(table) / np.maximum(counts, 1) / (counts > 0).sum()
            self._weights = torch.tensor(weights, dtype=torch.float32)

    def loss(self, outputs: ModelOutput, labels: Tensor, bounds: Tensor) -> Tensor:
        weights = None if self._weights is None else self._weights.to(labels.device)
        return F.cross_entropy(
            outputs.logits.float(), labels, weights, label_smoothing=self._smoothing,
            reduction="sum",
        )  # fmt: skip

    def _indices(self, names: list[str], table: Table) -> list[int]:
        for row, name in enumerate(names, 1):
            if name not in self._index:
                raise InputError(
                    f"expected a label of {', '.join(self.labels)}, got {name!r} in row {row} of "
                    f"{table.name!r}, which the model does not know"
                )
        return [self._index[name] for name in names]

    def predict(self, said: np.ndarray) -> int:
        return int(said.argmax())

    def losses(self, said: np.ndarray, gold: int) -> np.ndarray:
        return -log_softmax(said)[[gold]]

    def describe(self, said: np.ndarray) -> dict[str, Any]:
        shares = np.exp(log_softmax(said)).tolist()
        return {
            "prediction": self.labels[self.predict(said)],
            "probabilities": dict(zip(self.labels, shares, strict=True)),
        }

    def told(self, gold: int) -> str:
        return self.labels[gold]

    def score(self, predictions: list[int], gold: list[int]) -> dict[str, float]:
        from sklearn.metrics import accuracy_score, f1_score

        return {
            "accuracy": float(accuracy_score(gold, predictions)),
            "macro_f1": float(f1_score(gold, predictions, average="macro", zero_division=0.0)),
        }

    def baseline(self, train: list[int], gold: list[int]) -> tuple[str, list[int]]:
        most = Counter(train).most_common(1)[0][0]
        return f"always {self.labels[most]!r}", [most] * len(gold)

    def by_class(self, predictions: list[int], gold: list[int]) -> list[dict[str, Any]]:
        return _table_of(gold, predictions, labels=range(len(self.labels)), names=self.labels)

    def confusion(self, predictions: list[int], gold: list[int]) -> np.ndarray:
        from sklearn.metrics import confusion_matrix

        return confusion_matrix(gold, predictions, labels=range(len(self.labels)))


class MultiLabel(Task):
    """Any number of several classes, each for itself."""

    name, best = "multi-label", "micro_f1"

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, "problem_type": "multi_label_classification"}

    @classmethod
    def of(cls, *tables: Table) -> MultiLabel:
        names = [{name for row in cls._lists(table) for name in row} for table in tables]
        if not names[0]:
            raise InputError(
                f"expected labels in 'labels' of {tables[0].name!r}, got an empty list in every row"
            )
        return cls(_sorted(set.union(*names)))

    @staticmethod
    def _lists(table: Table) -> list[list[str]]:
        found = []
        for row, values in enumerate(_column(table, "labels"), 1):
            if not isinstance(values, list):
                raise InputError(
                    f"expected a list in 'labels', row {row} of {table.name!r}, got {values!r}"
                )
            found.append(_one_by_one(values, table, "labels") if values else [])
        return found

    def gold(self, table: Table) -> list[np.ndarray]:
        found = []
        for row, names in enumerate(self._lists(table), 1):
            strange = [name for name in names if name not in self._index]
            if strange:
                raise InputError(
                    f"expected labels of {', '.join(self.labels)}, got {strange[0]!r} in row {row} "
                    f"of {table.name!r}, which the model does not know"
                )
            found.append(np.isin(np.arange(len(self.labels)), [self._index[n] for n in names]))
        return found

    def targets(self, example: Example, gold: np.ndarray) -> Example:
        return {"labels": gold.astype(np.float32)}

    def predict(self, said: np.ndarray) -> np.ndarray:
        return said > 0

    def losses(self, said: np.ndarray, gold: np.ndarray) -> np.ndarray:
        return np.logaddexp(0, np.where(gold, -said, said).astype(np.float64))

    def describe(self, said: np.ndarray) -> dict[str, Any]:
        shares = 1 / (1 + np.exp(-said.astype(np.float64)))
        return {
            "prediction": self.told(self.predict(said)),
            "probabilities": dict(zip(self.labels, shares.tolist(), strict=True)),
        }

    def told(self, gold: np.ndarray) -> list[str]:
        return [label for label, has in zip(self.labels, gold, strict=True) if has]

    def score(self, predictions: list[np.ndarray], gold: list[np.ndarray]) -> dict[str, float]:
        from sklearn.metrics import f1_score

        right, said = np.stack(gold), np.stack(predictions)
        return {
            f"{average}_f1": float(f1_score(right, said, average=average, zero_division=0.0))
            for average in ("micro", "macro")
        } | {"exact": float((right == said).all(1).mean())}

    def baseline(
        self, train: list[np.ndarray], gold: list[np.ndarray]
    ) -> tuple[str, list[np.ndarray]]:
        often = np.stack(train).mean(0)
        said = often > 0.5
        said[often.argmax()] = True
        return f"always {', '.join(self.told(said))}", [said] * len(gold)

    def by_class(self, predictions: list[np.ndarray], gold: list[np.ndarray]) -> list[dict]:
        return _table_of(np.stack(gold), np.stack(predictions), labels=None, names=self.labels)


class Regression(Task):
    """A number for a text, or for a pair of texts."""

    name, best = "regression", "pearson"

    @property
    def config(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    @classmethod
    def of(cls, *tables: Table) -> Regression:
        task = cls([])
        if len(set(task.gold(tables[0]))) < 2:
            raise InputError(
                f"expected different numbers in 'label' of {tables[0].name!r}, got the same in "
                "every row: there is nothing to learn"
            )
        return task

    def gold(self, table: Table) -> list[float]:
        name = "score" if "score" in table.columns else "label"
        values = _column(table, name)
        for row, value in enumerate(values, 1):
            if type(value) not in (int, float) or not np.isfinite(value):
                raise InputError(
                    f"expected a number in {name!r}, row {row} of {table.name!r}, got {value!r}"
                )
        return [float(value) for value in values]

    def predict(self, said: np.ndarray) -> float:
        return float(said[0])

    def losses(self, said: np.ndarray, gold: float) -> np.ndarray:
        return (said.astype(np.float64) - gold) ** 2

    def describe(self, said: np.ndarray) -> dict[str, Any]:
        return {"prediction": self.predict(said)}

    def told(self, gold: float) -> float:
        return gold

    def score(self, predictions: list[float], gold: list[float]) -> dict[str, float]:
        from scipy.stats import pearsonr, spearmanr

        error = float(np.sqrt(np.mean((np.array(predictions) - np.array(gold)) ** 2)))
        if len(gold) < 2 or len(set(predictions)) < 2 or len(set(gold)) < 2:
            return {"pearson": 0.0, "spearman": 0.0, "rmse": error}  # undefined: nothing explained
        return {
            "pearson": float(pearsonr(predictions, gold).statistic),
            "spearman": float(spearmanr(predictions, gold).statistic),
            "rmse": error,
        }

    def baseline(self, train: list[float], gold: list[float]) -> tuple[str, list[float]]:
        mean = float(np.mean(train))
        return f"always {mean:.3g}, the mean", [mean] * len(gold)


def _table_of(gold, predictions, *, labels, names: list[str]) -> list[dict[str, Any]]:
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(
        gold, predictions, labels=labels and [*labels], zero_division=0.0
    )
    return [
        {"class": name, "precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
        for name, p, r, f, n in zip(names, *columns, strict=True)
    ]


def _one_by_one(values: list[Any], table: Table, column: str) -> list[str]:
    """Labels as names; numbers that are whole, texts and truth values may be some.

    Raises:
        InputError: something else, or several kinds of them.
    """
    kinds = Counter(type(value).__name__ for value in values)
    if len(kinds) > 1 or not set(kinds) <= {"str", "int", "bool"}:
        first = next(
            row for row, value in enumerate(values, 1)
            if type(value).__name__ != kinds.most_common(1)[0][0] or len(kinds) == 1
        )  # fmt: skip
        raise InputError(
            f"expected labels of one kind, texts or whole numbers, in {column!r} of "
            f"{table.name!r}, got {values[first - 1]!r} in row {first}"
        )
    for row, value in enumerate(values, 1):
        if value == "":
            raise InputError(
                f"expected a label in {column!r}, row {row} of {table.name!r}, got an empty one"
            )
    return [str(value) for value in values]


def _sorted(labels: set[str]) -> list[str]:
    """Numbers by what they are, names by the alphabet."""
    whole = all(label.lstrip("-").isdecimal() for label in labels)
    return sorted(labels, key=int) if whole else sorted(labels)


def _column(table: Table, name: str) -> list[Any]:
    if name not in table.columns:
        raise InputError(
            f"expected a column {name!r} in {table.name!r}, got {', '.join(table.columns)}"
        )
    return table.column(name)
