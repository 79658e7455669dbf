"""A tag for every token of a sentence, and the entities that tags make (IOB2: B-X, I-X, O)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..tasks.errors import InputError
from .table import Table
from .tasks import Example, Task, log_softmax

__all__ = ["Tagging", "entities_of"]

_IGNORED = -100
_OUTSIDE = "O"


def entities_of(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Entities as type, first token and the one behind the last.

    As in conlleval, which has scored CoNLL since 2000: an ``I-X`` that follows nothing of its type
    begins an entity.
    """
    found, kind, start = set(), None, 0
    for i, tag in enumerate([*tags, _OUTSIDE]):
        position, _, name = tag.partition("-")
        goes_on = position == "I" and name == kind
        if kind is not None and not goes_on:
            found.add((kind, start, i))
            kind = None
        if position != _OUTSIDE and not goes_on:
            kind, start = name, i
    return found


class Tagging(Task):
    """Named entities and the like: the first piece of each word has its tag."""

    name, best = "tagging", "f1"
    head, labels_of = "BertForTokenClassification", "token"

    @classmethod
    def of(cls, *tables: Table) -> Tagging:
        found = [{tag for tags in cls._tags(table) for tag in tags} for table in tables]
        if found[0] <= {_OUTSIDE}:
            raise InputError(
                f"expected tags such as B-PER in 'tags' of {tables[0].name!r}, got none but O"
            )
        names = set.union(*found)
        kinds = sorted({tag[2:] for tag in names - {_OUTSIDE}})
        return cls([_OUTSIDE, *(f"{place}-{kind}" for kind in kinds for place in "BI")])

    def problems(self, table: Table) -> dict[int, str]:
        return {
            place: f"expected a list of words in 'tokens', got {words!r}"
            for place, words in enumerate(self._words(table))
            if not isinstance(words, list) or not words or not all(
                isinstance(word, str) and word.strip() for word in words
            )
        }  # fmt: skip

    @staticmethod
    def _words(table: Table) -> list[list[str]]:
        if "tokens" not in table.columns:
            raise InputError(
                f"expected a column 'tokens' in {table.name!r}, got {', '.join(table.columns)}"
            )
        return table.column("tokens")

    @classmethod
    def _tags(cls, table: Table) -> list[list[str]]:
        if "tags" not in table.columns:
            raise InputError(
                f"expected a column 'tags' in {table.name!r}, got {', '.join(table.columns)}"
            )
        rows = table.column("tags")
        cls([]).check(table)
        for row, (words, tags) in enumerate(zip(cls._words(table), rows, strict=True), 1):
            if not isinstance(tags, list) or len(tags) != len(words):
                raise InputError(
                    f"expected {len(words)} tags in row {row} of {table.name!r}, one for each "
                    f"token, got {len(tags) if isinstance(tags, list) else tags!r}"
                )
            for tag in tags:
                if tag != _OUTSIDE and not (
                    isinstance(tag, str) and tag[:2] in ("B-", "I-") and tag[2:]
                ):
                    raise InputError(
                        f"expected tags B-X, I-X and O in row {row} of {table.name!r}, got {tag!r}"
                    )
        return rows

    def gold(self, table: Table) -> list[list[str]]:
        rows = self._tags(table)
        for row, tags in enumerate(rows, 1):
            for tag in tags:
                if tag not in self._index:
                    raise InputError(
                        f"expected a tag of {', '.join(self.labels)}, got {tag!r} in row {row} of "
                        f"{table.name!r}, which the model does not know"
                    )
        return rows

    def encode(
        self,
        table: Table,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        windows: bool = False,
    ) -> tuple[list[Example], int]:
        self.check(table)
        words = self._words(table)
        examples, cut = self._windows(
            tokenizer, [words], max_length, windows, "", is_split_into_words=True
        )
        return [{**x, "count": len(words[x["row"]])} for x in examples], cut

    def places(self, made: BatchEncoding, i: int) -> Example:
        """Words by number, and where their first pieces are; one that a window cuts in front has
        none in it."""
        ids = made.word_ids(i)
        first = [
            place for place, word in enumerate(ids)
            if word is not None and ids[place - 1] != word
            and (place > 1 or made["offset_mapping"][i][place][0] == 0)
        ]  # fmt: skip
        return {"words": [ids[place] for place in first], "first": first}

    def targets(self, example: Example, gold: list[str]) -> Example:
        labels = [_IGNORED] * len(example["input_ids"])
        for word, place in zip(example["words"], example["first"], strict=True):
            labels[place] = self._index[gold[word]]
        return {"labels": labels}

    def merge(self, parts: list[tuple[np.ndarray, Example]]) -> np.ndarray:
        """Logits ``[words, C]``, of each word from the window in which it has the most on both
        sides; NaN where a word is in none."""
        count = parts[0][1]["count"]
        said = np.full((count, len(self.labels)), np.nan)
        room = np.full(count, -1)
        for logits, example in parts:
            end = len(example["input_ids"]) - 1
            for word, place in zip(example["words"], example["first"], strict=True):
                around = min(place, end - place)
                if around > room[word]:
                    said[word], room[word] = logits[place], around
        return said

    def predict(self, said: np.ndarray) -> list[str]:
        """Of every word; one that was cut off is outside."""
        return [_OUTSIDE if np.isnan(row[0]) else self.labels[row.argmax()] for row in said]

    def losses(self, said: np.ndarray, gold: list[str]) -> np.ndarray:
        known = np.flatnonzero(~np.isnan(said[:, 0]))
        return -log_softmax(said[known])[range(len(known)), [self._index[gold[i]] for i in known]]

    def describe(self, said: np.ndarray) -> dict[str, Any]:
        tags = self.predict(said)
        entities = sorted(entities_of(tags), key=lambda entity: entity[1])
        return {
            "prediction": tags,
            "entities": [{"type": t, "start": a, "end": b} for t, a, b in entities],
        }

    def told(self, gold: list[str]) -> list[str]:
        return gold

    def score(self, predictions: list[list[str]], gold: list[list[str]]) -> dict[str, float]:
        counts = _counts(predictions, gold)
        same = [mine == right for pair in zip(predictions, gold, strict=True)
                for mine, right in zip(*pair, strict=True)]  # fmt: skip
        return {**_f1(*(sum(c.values()) for c in counts)), "accuracy": sum(same) / len(same)}

    def baseline(
        self, train: list[list[str]], gold: list[list[str]]
    ) -> tuple[str, list[list[str]]]:
        return "never an entity", [[_OUTSIDE] * len(tags) for tags in gold]

    def by_class(self, predictions: list[list[str]], gold: list[list[str]]) -> list[dict]:
        right, said, there = _counts(predictions, gold)
        return [
            {"class": kind, **_f1(right[kind], said[kind], there[kind]), "rows": there[kind]}
            for kind in sorted(there | said)
        ]


def _counts(
    predictions: list[list[str]], gold: list[list[str]]
) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """By type: entities that are right, that were said, that are there."""
    counts = Counter(), Counter(), Counter()
    for mine, right in zip(predictions, gold, strict=True):
        said, there = entities_of(mine), entities_of(right)
        for counter, entities in zip(counts, (said & there, said, there), strict=True):
            counter.update(kind for kind, _, _ in entities)
    return counts


def _f1(right: int, said: int, there: int) -> dict[str, float]:
    precision, recall = right / max(said, 1), right / max(there, 1)
    both = precision + recall
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / both if both else 0.0,
    }
