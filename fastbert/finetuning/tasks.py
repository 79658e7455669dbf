"""What can be learned from a table: for each task its columns, its head, and how well it does.

A task turns rows into examples, one for each or one for each window of a long one, and into right
answers; the logits of a row's examples into what is said of the row; that into a prediction; and
predictions with right answers into metrics. It knows no files and no devices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BatchEncoding, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from ..tasks.errors import InputError
from .table import Table

__all__ = [
    "Classification",
    "MultiLabel",
    "Regression",
    "Task",
    "log_softmax",
    "task_from_config",
]

Example = dict[str, Any]
INPUTS = ("input_ids", "token_type_ids")
STRIDE = 4  # windows share a quarter of their tokens


class Task(ABC):
    """What is the same for every task.

    Args:
        labels: names of the classes, in the order of the logits; of a regression none.

    Attributes:
        name: what ``--task`` calls it.
        head: the class of its model.
        labels_of: ``"sequence"`` or ``"token"``, what has a label.
        best: the metric that a model is chosen by; more is better.
        has_own_loss: whether `loss` takes the place of the model's.
    """

    name: str
    head = "BertForSequenceClassification"
    labels_of = "sequence"
    best: str
    has_own_loss = False

    def __init__(self, labels: Sequence[str]):
        self.labels = list(labels)
        self._index = {label: i for i, label in enumerate(self.labels)}

    @property
    def config(self) -> dict[str, Any]:
        """What the model's configuration has to say of it."""
        return {"id2label": dict(enumerate(self.labels)), "label2id": dict(self._index)}

    @classmethod
    @abstractmethod
    def of(cls, *tables: Table) -> Task:
        """The task with the labels of the tables, the first of which is trained on.

        Raises:
            InputError: columns or values that do not make one.
        """

    @abstractmethod
    def gold(self, table: Table) -> list[Any]:
        """The right answer for each row.

        Raises:
            InputError: a label that the task has not.
        """

    def problems(self, table: Table) -> dict[int, str]:
        """Rows that cannot be read, by their place: what was expected and what came.

        Raises:
            InputError: a column that is missing.
        """
        found = {}
        for name in _text_columns(table):
            for place, value in enumerate(table.column(name)):
                if not isinstance(value, str) or not value.strip():
                    got = "an empty one" if isinstance(value, str) else repr(value)
                    found.setdefault(place, f"expected a text in {name!r}, got {got}")
        return found

    def check(self, table: Table) -> None:
        """Raise for the first of `problems`."""
        for place, problem in self.problems(table).items():
            raise InputError(f"row {table.first + place} of {table.name!r}: {problem}")

    def encode(
        self,
        table: Table,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        windows: bool = False,
    ) -> tuple[list[Example], int]:
        """Rows as tokens without labels, and how many of them are longer than ``max_length``.

        Args:
            windows: a longer row becomes several examples, which overlap; otherwise it is cut.

        Returns:
            Examples in the order of the rows; ``row`` is the place of theirs.

        Raises:
            InputError: a row that `problems` has something against.
        """
        self.check(table)
        texts = [table.column(name) for name in _text_columns(table)]
        # Of a pair the first text is whole in every window; the second one moves.
        return self._windows(tokenizer, texts, max_length, windows, "only_second")

    def _windows(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: list[list[Any]],
        max_length: int,
        windows: bool,
        moves: str,
        **options: Any,
    ) -> tuple[list[Example], int]:
        whole = tokenizer(*texts, verbose=False, **options)["input_ids"]
        cut = sum(len(ids) > max_length for ids in whole)
        if windows and cut and len(texts) > 1:
            _check_room(tokenizer, texts[0], max_length)
        made = tokenizer(
            *texts,
            truncation=moves if windows and len(texts) > 1 else True,
            max_length=max_length,
            stride=max_length // STRIDE if windows else 0,
            return_overflowing_tokens=windows,
            return_offsets_mapping=True,
            **options,
        )
        rows = made.pop("overflow_to_sample_mapping", range(len(whole)))
        examples = []
        for i, row in enumerate(rows):
            example = {key: made[key][i] for key in ("input_ids", "token_type_ids") if key in made}
            examples.append({**example, "row": row, **self.places(made, i)})
        return examples, cut

    def places(self, made: BatchEncoding, i: int) -> Example:
        """What of an example's tokens has to be known later."""
        return {}

    def with_labels(self, examples: list[Example], gold: list[Any]) -> list[Example]:
        """Examples to train on."""
        return [
            {**{key: x[key] for key in INPUTS if key in x}, **self.targets(x, gold[x["row"]])}
            for x in examples
        ]

    def targets(self, example: Example, gold: Any) -> Example:
        """A right answer as the loss takes it."""
        return {"labels": gold}

    def loss(self, outputs: ModelOutput, labels: Tensor, bounds: Tensor) -> Tensor:
        """Where the model's own will not do for packed batches: the sum over all labels.

        Args:
            labels: of the batch.
            bounds: where its sequences begin and end, ``[B + 1]``.
        """
        raise NotImplementedError

    def logits(self, outputs: ModelOutput, lengths: list[int]) -> list[np.ndarray]:
        """Of each example in a packed batch: ``[C]``, or ``[n, C]`` of its tokens."""
        found = outputs.logits.detach().float().cpu()
        parts = found[0].split(lengths) if self.labels_of == "token" else found.unbind(0)
        return [part.numpy() for part in parts]

    def merge(self, parts: list[tuple[np.ndarray, Example]]) -> Any:
        """What is said of a row by the logits of its examples: their mean."""
        return np.mean([logits for logits, _ in parts], axis=0)

    @abstractmethod
    def predict(self, said: Any) -> Any:
        """A prediction from what `merge` gives, of the kind of `gold`."""

    @abstractmethod
    def losses(self, said: Any, gold: Any) -> np.ndarray:
        """Of everything in a row that has a label."""

    @abstractmethod
    def describe(self, said: Any) -> dict[str, Any]:
        """A prediction for people and programs, as JSON."""

    @abstractmethod
    def told(self, gold: Any) -> Any:
        """A right answer as JSON."""

    @abstractmethod
    def score(self, predictions: list[Any], gold: list[Any]) -> dict[str, float]:
        """Metrics, `best` among them."""

    @abstractmethod
    def baseline(self, train: list[Any], gold: list[Any]) -> tuple[str, list[Any]]:
        """What is said without looking: a name for it, and a prediction for each row."""

    def by_class(self, predictions: list[Any], gold: list[Any]) -> list[dict[str, Any]]:
        """Precision, recall, F1 and support of each class."""
        return []

    def confusion(self, predictions: list[Any], gold: list[Any]) -> np.ndarray | None:
        """``[C, C]``, how often a class (row) was taken for another; None where that is nothing."""
        return None


def _text_columns(table: Table) -> tuple[str, ...]:
    """The columns of the first and, in a table of pairs, the second texts.

    Raises:
        InputError: there are none.
    """
    if {"text_a", "text_b"} <= set(table.columns):
        return "text_a", "text_b"
    if "text" in table.columns:
        return ("text",)
    raise InputError(
        f"expected a column 'text', or 'text_a' and 'text_b', in {table.name!r}, got "
        f"{', '.join(table.columns)}"
    )


def _check_room(tokenizer: PreTrainedTokenizerBase, first: list[Any], max_length: int) -> None:
    """Whether the first text of every pair leaves half a window to the second.

    Raises:
        InputError: one that does not.
    """
    for row, ids in enumerate(tokenizer(first, add_special_tokens=False)["input_ids"], 1):
        if len(ids) > max_length // 2:
            raise InputError(
                f"expected a first text of at most {max_length // 2} tokens, half of --max-length, "
                f"got {len(ids)} in row {row}; windows move over the second text alone"
            )


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


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last dimension, in fp64."""
    logits = logits - logits.max(-1, keepdims=True).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


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


def task_from_config(config: PreTrainedConfig) -> Task:
    """The task of a checkpoint with a head of its own, by what its configuration says.

    Raises:
        InputError: a head of another kind, or none.
    """
    from .answering import Answering
    from .tagging import Tagging

    head = (config.architectures or ["none"])[0]
    labels = [config.id2label[i] for i in range(config.num_labels)]
    if head == Tagging.head:
        return Tagging(labels)
    if head == Answering.head:
        answering = Answering([])
        answering.threshold = getattr(config, "no_answer_threshold", answering.threshold)
        return answering
    if head != Task.head:
        heads = " or ".join((Task.head, Tagging.head, Answering.head))
        raise InputError(
            f"expected a checkpoint with a {heads}, got a {head}; fastbert finetune trains one"
        )
    if config.problem_type == "multi_label_classification":
        return MultiLabel(labels)
    if config.problem_type == "regression" or config.num_labels == 1:
        return Regression([])
    return Classification(labels)
