"""What a task is: what can be learned from a table.

A task turns rows into examples, one for each or one for each window of a long one, and into right
answers; the logits of a row's examples into what is said of the row; that into a prediction; and
predictions with right answers into metrics. It knows no files and no devices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from ..tasks.errors import InputError
from .table import Table

__all__ = ["INPUTS", "Example", "Task", "log_softmax", "tokens_of"]

Example = dict[str, Any]
INPUTS = ("input_ids", "token_type_ids")
STRIDE = 4  # windows share a quarter of their tokens


class Task(ABC):
    """What is the same for every task.

    Args:
        labels: names of the classes, in the order of the logits; of a regression none.

    Attributes:
        name: what ``--task`` calls it.
        head: the class of its model, behind the name of the family.
        pipeline: what the Hugging Face hub calls it.
        labels_of: ``"sequence"`` or ``"token"``, what has a label.
        best: the metric that a model is chosen by; more is better.
        has_own_loss: whether `loss` takes the place of the model's.
    """

    name: str
    head = "ForSequenceClassification"
    pipeline = "text-classification"
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

    def check_model(self, model: PreTrainedModel) -> None:  # noqa: B027 - most take any
        """Look at a model that was loaded.

        Raises:
            InputError: one that is not for this task.
        """

    def remarks(self, table: Table) -> list[str]:
        """What the report should say of how rows are understood."""
        return []

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
        examples, longer = self._windows(tokenizer, texts, max_length, windows, "only_second")
        return examples, len(longer)

    def _windows(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: list[list[Any]],
        max_length: int,
        windows: bool,
        moves: str,
        **options: Any,
    ) -> tuple[list[Example], list[int]]:
        """Examples, and which of the texts are longer than one."""
        made = tokenizer(*texts, return_offsets_mapping=True, verbose=False, **options)
        rows: Sequence[int] = range(len(made["input_ids"]))
        longer = [i for i in rows if len(made["input_ids"][i]) > max_length]
        if longer:
            if windows and len(texts) > 1:
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
            rows = made.pop("overflow_to_sample_mapping", rows)
        examples = []
        for i, row in enumerate(rows):
            example = {key: made[key][i] for key in ("input_ids", "token_type_ids") if key in made}
            examples.append({**example, "row": row, **self.places(made, i)})
        return examples, longer

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


def tokens_of(example: Example) -> int:
    """How many it has, in all its sequences."""
    ids = example["input_ids"]
    return sum(map(len, ids)) if isinstance(ids[0], list) else len(ids)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last dimension, in fp64."""
    logits = logits - logits.max(-1, keepdims=True).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
