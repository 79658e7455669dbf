"""How likely a text is to a masked language model: its pseudo-log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..tasks.errors import InputError
from .masked import MaskedModel, neighbours

_TOGETHER = 2**19  # tokens of masked copies that are in memory

__all__ = ["Scored", "places_known", "score", "token_ids"]


class Scored(NamedTuple):
    """Of a text.

    Attributes:
        log_likelihood: the sum over its tokens of the logarithm of the probability of each, when
            all others are known (Salazar et al., 1910.14659).
        tokens: how many; the first and the last one, which every text has, are not counted.
    """

    log_likelihood: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Of a token, that is comparable between texts of different lengths."""
        return math.exp(-self.log_likelihood / self.tokens)


def token_ids(model: MaskedModel, text: str) -> list[int]:
    """Tokens of a text.

    Raises:
        InputError: an empty one, or one that is too long for the model.
    """
    ids = model.tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < 3:
        raise InputError(f"expected a text with a word or more, got {text!r}")
    if len(ids) > model.limit:
        raise InputError(
            f"expected at most {model.limit} tokens, the positions that the model knows, got "
            f"{len(ids)}; split the text"
        )
    return ids


def places_known(
    model: MaskedModel, texts: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
) -> Iterator[list[float]]:
    """For each text the logarithm of the probability of what stands at each place, when all other
    tokens are known.

    Args:
        texts: token ids.
        places: of each text.
    """
    mask = model.tokenizer.mask_token_id
    sizes = [len(ids) * len(each) for ids, each in zip(texts, places, strict=True)]
    for start, end in neighbours(sizes, _TOGETHER):
        copies, where = [], []
        for ids, each in zip(texts[start:end], places[start:end], strict=True):
            for place in each:
                copies.append([*ids[:place], mask, *ids[place + 1 :]])
                where.append([place])
        said = model.log_probs(copies, where)
        for ids, each in zip(texts[start:end], places[start:end], strict=True):
            yield [float(next(said)[0, ids[place]]) for place in each]


def score(model: MaskedModel, texts: Sequence[str]) -> Iterator[Scored]:
    """The pseudo-log-likelihood of each text, in turn: of `n` tokens by `n` masked copies.

    Raises:
        InputError: as `token_ids`, before any work.
    """
    ids = [token_ids(model, text) for text in texts]
    for known in places_known(model, ids, [range(1, len(each) - 1) for each in ids]):
        yield Scored(sum(known), len(known))
