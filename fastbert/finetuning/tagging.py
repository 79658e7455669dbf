"""A tag for every token of a sentence, and the entities that tags make (IOB2: B-X, I-X, O)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

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
        self, table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> tuple[list[Example], int]:
        self.check(table)
        words = self._words(table)
        made = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
        keys = [key for key in ("input_ids", "token_type_ids") if key in made]
        examples, cut = [], 0
        for row, mine in enumerate(words):
            ids = made.word_ids(row)
            first = [i for i, word in enumerate(ids)
                     if word is not None and (i == 0 or ids[i - 1] != word)]  # fmt: skip
            cut += len(first) < len(mine)
            examples.append(
                {key: made[key][row] for key in keys}
                | {"words": [ids[i] for i in first], "first": first, "count": len(mine)}
            )
        return examples, cut

    def with_labels(self, examples: list[Example], gold: list[list[str]]) -> list[Example]:
        made = []
        for example, tags in zip(examples, gold, strict=True):
            labels = [_IGNORED] * len(example["input_ids"])
            for word, place in zip(example["words"], example["first"], strict=True):
                labels[place] = self._index[tags[word]]
            kept = {key: example[key] for key in ("input_ids", "token_type_ids") if key in example}
            made.append({**kept, "labels": labels})
        return made

    def predict(self, logits: np.ndarray, example: Example) -> list[str]:
        """Of every word; one that was cut off is outside."""
        tags = [_OUTSIDE] * example["count"]
        best = logits.argmax(-1)
        for word, place in zip(example["words"], example["first"], strict=True):
            tags[word] = self.labels[best[place]]
        return tags

    def losses(self, logits: np.ndarray, example: Example, gold: list[str]) -> np.ndarray:
        right = [self._index[gold[word]] for word in example["words"]]
        return -log_softmax(logits)[example["first"], right]

    def describe(self, logits: np.ndarray, example: Example) -> dict[str, Any]:
        tags = self.predict(logits, example)
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
