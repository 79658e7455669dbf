"""One of several continuations or answers, each read with the context (SWAG, RACE)."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..tasks.errors import InputError
from .table import Table
from .tasks import INPUTS, Example, Task, log_softmax

__all__ = ["MultipleChoice"]


class _Said(NamedTuple):
    """Logits of a row's choices, ``[C]``, and the choices."""

    logits: np.ndarray
    choices: list[str]


class MultipleChoice(Task):
    """Multiple choice; every row has choices of its own, two or more."""

    name, best = "multiple-choice", "accuracy"
    head, pipeline = "ForMultipleChoice", "multiple-choice"

    @property
    def config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def of(cls, *tables: Table) -> MultipleChoice:
        task = cls([])
        task.check(tables[0])
        task.gold(tables[0])
        return task

    def check_model(self, model: PreTrainedModel) -> None:
        if getattr(model.base_model, "pooler", None) is None:
            raise InputError(
                "expected a model with a pooler for multiple choice, whose choices are packed, got "
                f"a {model.config.model_type}"
            )

    def problems(self, table: Table) -> dict[int, str]:
        found = {}
        for place, (context, choices) in enumerate(_rows(table)):
            if not isinstance(context, str) or not context.strip():
                found[place] = f"expected a text in 'context', got {context!r}"
            elif not isinstance(choices, list) or len(choices) < 2 or not all(
                isinstance(choice, str) and choice.strip() for choice in choices
            ):  # fmt: skip
                found[place] = f"expected a list of two texts or more in 'choices', got {choices!r}"
        return found

    def gold(self, table: Table) -> list[int]:
        if "label" not in table.columns:
            raise InputError(
                f"expected a column 'label' in {table.name!r}, got {', '.join(table.columns)}"
            )
        labels = table.column("label")
        for row, ((_, choices), label) in enumerate(zip(_rows(table), labels, strict=True)):
            count = len(choices) if isinstance(choices, list) else 0
            if type(label) is not int or not 0 <= label < count:
                raise InputError(
                    f"expected a whole number from 0 to {count - 1} in 'label', the place of the "
                    f"right choice, in row {table.first + row} of {table.name!r}, got {label!r}"
                )
        return labels

    def encode(
        self,
        table: Table,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        windows: bool = False,
    ) -> tuple[list[Example], int]:
        """An example for each row; its ``input_ids`` are a list for each choice, behind the
        context.

        Raises:
            InputError: ``windows``, of which choices have none; as `Task.encode`.
        """
        if windows:
            raise InputError("expected --long cut with multiple choice, got windows")
        self.check(table)
        rows = _rows(table)
        owners = [row for row, (_, choices) in enumerate(rows) for _ in choices]
        contexts = [rows[owner][0] for owner in owners]
        choices = [choice for _, choices in rows for choice in choices]
        sequences, longer = self._windows(tokenizer, [contexts, choices], max_length, False, "")
        examples: list[Example] = [
            {"row": row, "choices": choices} for row, (_, choices) in enumerate(rows)
        ]
        for owner, sequence in zip(owners, sequences, strict=True):
            for name in INPUTS:
                if name in sequence:
                    examples[owner].setdefault(name, []).append(sequence[name])
        return examples, len({owners[i] for i in longer})

    def merge(self, parts: list[tuple[np.ndarray, Example]]) -> _Said:
        ((logits, example),) = parts
        return _Said(logits[: len(example["choices"])], example["choices"])

    def predict(self, said: _Said) -> int:
        return int(said.logits.argmax())

    def losses(self, said: _Said, gold: int) -> np.ndarray:
        return -log_softmax(said.logits)[[gold]]

    def describe(self, said: _Said) -> dict[str, Any]:
        place = self.predict(said)
        return {
            "prediction": place,
            "choice": said.choices[place],
            "probabilities": np.exp(log_softmax(said.logits)).tolist(),
        }

    def told(self, gold: int) -> int:
        return gold

    def score(self, predictions: list[int], gold: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.equal(predictions, gold)))}

    def baseline(self, train: list[int], gold: list[int]) -> tuple[str, list[int]]:
        most = Counter(train).most_common(1)[0][0]
        return f"always choice {most}", [most] * len(gold)


def _rows(table: Table) -> list[tuple[Any, Any]]:
    """Contexts and choices.

    Raises:
        InputError: a column that is missing.
    """
    if not {"context", "choices"} <= set(table.columns):
        raise InputError(
            f"expected columns context and choices in {table.name!r}, got "
            f"{', '.join(table.columns)}"
        )
    return table.rows(("context", "choices"))
