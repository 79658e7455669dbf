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

_PLACES = 8  # that are tried for a wrong next sentence that fits
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
            j = min(max(j, i + 2), last)  # two sentences always fit, each has at most half the room
            cut = i + chance.between(1, j - i - 1) if j - i > 1 else j
            wrong = cut == j or chance.number() < 0.5
            a.extend((ends[i], ends[cut]))
            if wrong:
                other = chance.below(len(documents) - 1)
                elsewhere = documents[other + (other >= index)]
                size = ends[cut] - ends[i]
                # Gathered as what it displaces, or its length would give the answer away.
                fills = j < last or cut == j
                whole = ends[j] - ends[i]
                wanted = (max(target, whole) if fills else whole) - size
                b.extend(bounds.somewhere(elsewhere, wanted, room - size, fills, chance))
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


class _Bounds:
    """Where the sentences of documents begin and end; those above a limit come in equal parts."""

    def __init__(self, corpus: Corpus, limit: int):
        sizes = np.diff(corpus.sentences)
        parts = -(-sizes // limit)
        behind = np.cumsum(parts)
        which = np.repeat(np.arange(len(sizes)), parts)
        part = np.arange(len(which)) - (behind - parts)[which]
        starts = corpus.sentences[which] + sizes[which] * part // parts[which]
        self._ends = np.append(starts, corpus.sentences[-1])
        self._first = np.concatenate([[0], behind])[corpus.first]

    def of(self, document: int) -> list[int]:
        first, last = self._first[document : document + 2]
        return self._ends[first : last + 1].tolist()

    def somewhere(
        self, document: int, wanted: int, room: int, fills: bool, chance: _Chance
    ) -> tuple[int, int]:
        """Sentences from a random place of a document on: as many as fit into a length, or, where
        they need not fill it, as come closest to it. Part of one where none is found that fits."""
        first, last = self._first[document : document + 2].tolist()
        limit = min(wanted, room) if fills else room
        for _ in range(_PLACES):
            i = first + chance.below(last - first)
            start = int(self._ends[i])
            ends = self._ends[i + 1 : last + 1]
            k = int(np.searchsorted(ends, start + wanted, side="right")) - 1
            if not fills and k + 1 < len(ends):
                over, under = (
                    ends[k + 1] - start - wanted,
                    wanted - (ends[k] - start if k >= 0 else 0),
                )
                k += int(over < under)
            while k >= 0 and ends[k] - start > limit:
                k -= 1
            if k >= 0:
                return start, int(ends[k])
        return start, start + min(max(limit, 1), int(ends[0]) - start)


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
