"""A tag for every word of a sentence, and the entities that tags make (IOB2: B-X, I-X, O).

Words come split, or as a text with entities as spans of characters (`spans`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..tasks.errors import InputError
from .spans import Word, tags_of_spans, words_of
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


class _Said(NamedTuple):
    """Logits ``[words, C]``; the words of a row that came as a text, and that text."""

    logits: np.ndarray
    words: list[Word] | None = None
    text: str = ""


class Tagging(Task):
    """Named entities and the like: the first piece of each word has its tag."""

    name, best = "tagging", "f1"
    head, labels_of = "ForTokenClassification", "token"
    pipeline = "token-classification"

    @classmethod
    def of(cls, *tables: Table) -> Tagging:
        found = [{tag for tags in cls._tags(table) for tag in tags} for table in tables]
        if found[0] <= {_OUTSIDE}:
            raise InputError(
                f"expected an entity or more in {tables[0].name!r}, tags such as B-PER or spans, "
                "got none in all rows"
            )
        names = set.union(*found)
        kinds = sorted({tag[2:] for tag in names - {_OUTSIDE}})
        return cls([_OUTSIDE, *(f"{place}-{kind}" for kind in kinds for place in "BI")])

    def problems(self, table: Table) -> dict[int, str]:
        if "tokens" not in table.columns:
            return super().problems(table)
        return {
            place: f"expected a list of words in 'tokens', got {words!r}"
            for place, words in enumerate(table.column("tokens"))
            if not isinstance(words, list) or not words or not all(
                isinstance(word, str) and word.strip() for word in words
            )
        }  # fmt: skip

    def remarks(self, table: Table) -> list[str]:
        if "tags" in table.columns:
            return []
        count = sum(widened for _, widened in self._spans(table))
        return [f"{count:,} spans begin or end inside a word, all of which they get"] * (count > 0)

    @classmethod
    def _spans(cls, table: Table) -> list[tuple[list[str], int]]:
        for name in ("text", "spans"):
            if name not in table.columns:
                raise InputError(
                    "expected columns tokens and tags, or text and spans, in "
                    f"{table.name!r}, got {', '.join(table.columns)}"
                )
        cls([]).check(table)
        return [
            tags_of_spans(spans, text, f"row {row} of {table.name!r}")
            for row, (text, spans) in enumerate(table.rows(("text", "spans")), table.first)
        ]

    @classmethod
    def _tags(cls, table: Table) -> list[list[str]]:
        if not {"tokens", "tags"} <= set(table.columns):
            return [tags for tags, _ in cls._spans(table)]
        cls([]).check(table)
        pairs = table.rows(("tokens", "tags"))
        for row, (words, tags) in enumerate(pairs, table.first):
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
        return [tags for _, tags in pairs]

    def gold(self, table: Table) -> list[list[str]]:
        rows = self._tags(table)
        for row, tags in enumerate(rows, table.first):
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
        more: list[Example]
        if "tokens" in table.columns:
            words = table.column("tokens")
            more = [{"count": len(row)} for row in words]
        else:
            texts = table.column("text")
            found = [*map(words_of, texts)]
            words = [[word for word, _, _ in row] for row in found]
            more = [
                {"count": len(row), "in": row, "text": text}
                for row, text in zip(found, texts, strict=True)
            ]
        examples, longer = self._windows(
            tokenizer, [words], max_length, windows, "", is_split_into_words=True
        )
        return [{**x, **more[x["row"]]} for x in examples], len(longer)

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

    def merge(self, parts: list[tuple[np.ndarray, Example]]) -> _Said:
        """Logits of each word from the window in which it has the most on both sides; NaN where a
        word is in none."""
        row = parts[0][1]
        count = row["count"]
        said = np.full((count, len(self.labels)), np.nan)
        room = np.full(count, -1)
        for logits, example in parts:
            end = len(example["input_ids"]) - 1
            for word, place in zip(example["words"], example["first"], strict=True):
                around = min(place, end - place)
                if around > room[word]:
                    said[word], room[word] = logits[place], around
        return _Said(said, row.get("in"), row.get("text", ""))

    def predict(self, said: _Said) -> list[str]:
        """Of every word; one that was cut off is outside."""
        return [_OUTSIDE if np.isnan(row[0]) else self.labels[row.argmax()] for row in said.logits]

    def losses(self, said: _Said, gold: list[str]) -> np.ndarray:
        known = np.flatnonzero(~np.isnan(said.logits[:, 0]))
        labels = [self._index[gold[i]] for i in known]
        return -log_softmax(said.logits[known])[range(len(known)), labels]

    def describe(self, said: _Said) -> dict[str, Any]:
        """Tags, and entities as spans: of words, or of the characters of a text."""
        tags = self.predict(said)
        entities = sorted(entities_of(tags), key=lambda entity: entity[1])
        if said.words is None:
            spans = [{"label": t, "start": a, "end": b} for t, a, b in entities]
            return {"prediction": tags, "entities": spans}
        spans = []
        for label, first, behind in entities:
            start, end = said.words[first].start, said.words[behind - 1].end
            text = said.text[start:end]
            spans.append({"label": label, "start": start, "end": end, "text": text})
        words = [word for word, _, _ in said.words]
        return {"tokens": words, "prediction": tags, "entities": spans}

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
