"""What a model sees of a corpus in an epoch: pairs of segments, or single ones.

Pairs are those of BERT (Devlin et al., 1810.04805, section 3.1 and appendix A.2): sentences of a
document are gathered until they fill the length, which in one case of ten is a shorter one. They
are cut in two at a random place, and in half of the cases sentences of another document take the
place of the second part; those that gave way are gathered again. So every token of every document
is seen once in an epoch, beside what it is seen of as somebody's wrong neighbour.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..tasks.errors import InputError
from .corpus import Corpus

__all__ = ["Drawn", "SegmentDataset", "Segments", "draw"]

SHORT = 0.1  # share of examples that want a shorter length
SPECIAL_TOKENS = {True: 3, False: 2}  # of a pair [CLS] A [SEP] B [SEP], of a segment [CLS] A [SEP]


@dataclass(frozen=True, eq=False)
class Segments:
    """The examples of an epoch.

    Attributes:
        a, b: int64 ``[N, 2]``, where each segment begins and ends, in tokens of a `Corpus`; ``b``
            is empty where there are no pairs.
        random: int8 ``[N]``, 1 where ``b`` does not follow ``a``: BERT's ``next_sentence_label``.
        pairs: whether there are pairs.
    """

    a: np.ndarray
    b: np.ndarray
    random: np.ndarray
    pairs: bool

    def __len__(self) -> int:
        return len(self.random)

    @property
    def lengths(self) -> np.ndarray:
        """``[N]``, tokens of each with its special tokens."""
        both = (self.a[:, 1] - self.a[:, 0]) + (self.b[:, 1] - self.b[:, 0])
        return both + SPECIAL_TOKENS[self.pairs]


def draw(
    corpus: Corpus,
    documents: np.ndarray,
    *,
    max_length: int,
    pairs: bool = True,
    seed: int = 0,
    epoch: int = 0,
) -> Segments:
    """The examples of an epoch, which follow from the arguments alone.

    Args:
        documents: which of the corpus.
        max_length: tokens of an example, special ones included.
        pairs: for next-sentence prediction; otherwise single segments.

    Raises:
        InputError: pairs of fewer than two documents.
        ValueError: a ``max_length`` that has no room for a token of each segment.
    """
    room = max_length - SPECIAL_TOKENS[pairs]
    if room < 1 + pairs:
        raise ValueError(
            f"draw: expected a max_length of {SPECIAL_TOKENS[pairs] + 1 + pairs} or more, "
            f"got {max_length}"
        )
    if pairs and len(documents) < 2:
        raise InputError(
            f"expected two documents or more for next-sentence prediction, got {len(documents)}: "
            "the wrong next sentence comes from another one. A blank line in a .txt begins a new "
            "document; --no-nsp trains without pairs"
        )
    chance = _Chance(np.random.default_rng([seed, epoch, 1]))
    bounds = _Bounds(corpus, room // 2 if pairs else room)
    a, b, random = array("q"), array("q"), array("b")
    for index, document in enumerate(documents):
        ends = bounds.of(document)
        i, last = 0, len(ends) - 1
        while i < last:
            target = room if chance.number() >= SHORT else chance.between(2, room)
            j = max(bisect_right(ends, ends[i] + target, i + 1) - 1, i + 1)
            if not pairs:
                a.extend((ends[i], ends[j]))
                b.extend((0, 0))
                random.append(0)
                i = j
                continue
            cut = i + chance.between(1, j - i - 1) if j - i > 1 else j
            wrong = cut == j or chance.number() < 0.5
            a.extend((ends[i], ends[cut]))
            if wrong:
                other = chance.below(len(documents) - 1)
                elsewhere = documents[other + (other >= index)]
                size = ends[cut] - ends[i]
                b.extend(_somewhere(corpus, elsewhere, target - size, room - size, chance))
            else:
                b.extend((ends[cut], ends[j]))
            random.append(wrong)
            i = cut if wrong else j
    return Segments(
        np.array(a, np.int64).reshape(-1, 2),
        np.array(b, np.int64).reshape(-1, 2),
        np.array(random, np.int8),
        pairs,
    )


def _somewhere(
    corpus: Corpus, document: int, wanted: int, room: int, chance: _Chance
) -> tuple[int, int]:
    """Sentences from a random place of a document on, cut at the front or the back to fit."""
    first, behind = corpus.first[document : document + 2].tolist()
    i = first + chance.below(behind - first)
    start = int(corpus.sentences[i])
    j = i + 1 + int(np.searchsorted(corpus.sentences[i + 1 : behind], start + wanted))
    end = int(corpus.sentences[j])
    if end - start > room:
        start, end = (start, start + room) if chance.number() < 0.5 else (end - room, end)
    return start, end


class _Bounds:
    """Where the sentences of a document begin and end; those above a limit come in equal parts."""

    def __init__(self, corpus: Corpus, limit: int):
        self._corpus, self._limit = corpus, limit

    def of(self, document: int) -> list[int]:
        first, behind = self._corpus.first[document : document + 2]
        ends = self._corpus.sentences[first : behind + 1]
        sizes = np.diff(ends)
        if sizes.max() <= self._limit:
            return ends.tolist()
        cut = [ends[:1]]
        for start, size in zip(ends, sizes, strict=False):
            parts = -(-size // self._limit)
            cut.append(start + size * np.arange(1, parts + 1) // parts)
        return np.concatenate(cut).tolist()


class _Chance:
    """Random numbers one at a time, drawn many at a time."""

    def __init__(self, generator: np.random.Generator):
        self._numbers = self._all(generator)

    @staticmethod
    def _all(generator: np.random.Generator) -> Iterator[float]:
        while True:
            yield from generator.random(1 << 14).tolist()

    def number(self) -> float:
        """In [0, 1)."""
        return next(self._numbers)

    def below(self, count: int) -> int:
        """In [0, count)."""
        return int(next(self._numbers) * count)

    def between(self, low: int, high: int) -> int:
        """In [low, high]."""
        return low + self.below(high - low + 1)


class Drawn(NamedTuple):
    """Everything that an example follows from: a key of `SegmentDataset`."""

    epoch: int
    example: int
    a: tuple[int, int]
    b: tuple[int, int]
    random: int
    probability: float


class SegmentDataset(Dataset):
    """Examples by what a sampler has drawn, so that workers need nothing but the corpus.

    Gives what `fastbert.training.PackedCollator` takes, masking included: ``input_ids``,
    ``token_type_ids``, ``next_sentence_label`` of pairs, ``example``, ``epoch``, ``probability``.
    """

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, pairs: bool):
        self._corpus, self._pairs = corpus, pairs
        self._cls = np.array([tokenizer.cls_token_id], np.int64)
        self._sep = np.array([tokenizer.sep_token_id], np.int64)

    def __getitem__(self, drawn: Drawn) -> Mapping[str, object]:
        first = [self._cls, self._corpus.tokens(*drawn.a), self._sep]
        second = [self._corpus.tokens(*drawn.b), self._sep] if self._pairs else []
        ids = np.concatenate([*first, *second])
        kinds = np.zeros(len(ids), np.int64)
        kinds[sum(map(len, first)) :] = 1
        example = {
            "input_ids": ids.astype(np.int64),
            "token_type_ids": kinds,
            "example": drawn.example,
            "epoch": drawn.epoch,
            "probability": drawn.probability,
        }
        return example | ({"next_sentence_label": drawn.random} if self._pairs else {})
