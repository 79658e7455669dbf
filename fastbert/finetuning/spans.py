"""Entities as spans of characters, and the words of a text that they are tags of."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import tokenizers
from tokenizers import pre_tokenizers

from ..tasks.errors import InputError

__all__ = ["Word", "tags_of_spans", "words_of"]


class Word(NamedTuple):
    """A word, and where in its text it begins and ends, in characters."""

    word: str
    start: int
    end: int


@cache
def _splitter() -> pre_tokenizers.PreTokenizer:
    each = pre_tokenizers.Split(tokenizers.Regex(r"\p{Han}"), "isolated")
    return pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), each])


def words_of(text: str) -> list[Word]:
    """Words as BERT splits a text before it looks for pieces: at white space; every punctuation
    mark and every Chinese character is one of its own."""
    return [Word(word, *edges) for word, edges in _splitter().pre_tokenize_str(text)]


def tags_of_spans(spans: Any, text: str, where: str) -> tuple[list[str], int]:
    """A tag for each word of a text, and how many spans begin or end inside a word.

    Such a span gets all of that word.

    Args:
        spans: mappings with ``start``, ``end`` and ``label``, in characters; or one mapping with a
            list of each, as `datasets` may give them.
        where: what messages call the row.

    Raises:
        InputError: something else, a span that is not in the text or has no word, or two that share
            a word.
    """
    words = words_of(text)
    tags, widened = ["O"] * len(words), 0
    for span in _one_by_one(spans, where):
        try:
            start, end, label = span["start"], span["end"], span["label"]
            inside = [i for i, word in enumerate(words) if word.start < end and start < word.end]
        except (TypeError, KeyError):
            inside = []
        if not inside or start < 0 or end > len(text) or not isinstance(label, str) or not label:
            raise InputError(
                f"expected spans with start, end and label in {where}, in characters of its text, "
                f"got {span!r}"
            )
        if any(tags[i] != "O" for i in inside):
            raise InputError(
                f"expected spans that share no word in {where}, got {span!r}, which does with "
                "another one; BIO tags have no room for both"
            )
        widened += (words[inside[0]].start, words[inside[-1]].end) != (start, end)
        for place, i in enumerate(inside):
            tags[i] = f"{'I' if place else 'B'}-{label}"
    return tags, widened


def _one_by_one(spans: Any, where: str) -> list[Any]:
    try:
        if isinstance(spans, dict):
            columns = zip(*spans.values(), strict=True)
            spans = [dict(zip(spans, values, strict=True)) for values in columns]
        if isinstance(spans, list):
            return spans
    except (TypeError, ValueError):  # no lists, or not as long as each other
        pass
    raise InputError(f"expected a list of spans in {where}, got {spans!r}")
