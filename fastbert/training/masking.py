"""Masked-language-model inputs: which tokens are hidden, and by what.

Whether a token is masked follows from numbers alone: a seed, the epoch, the example, the token's
place in it. So a batch's other examples, the number of workers and a restart change nothing, and
nothing has to be stored.
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "Masking"]

IGNORED = -100  # the label of tokens that no loss is computed of, as everywhere in transformers
_WEYL = 0x9E3779B97F4A7C15  # splitmix64 counts in steps of it
_GOLDEN = np.uint64(_WEYL)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Numbers without a visible relation to uint64 ``x``: the finaliser of splitmix64 (Steele,
    Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniform(keys: np.ndarray, stream: int) -> np.ndarray:
    """A number in [0, 1) for each key, in every stream another."""
    bits = _mixed(keys + np.uint64((stream + 1) * _WEYL % 2**64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Masking:
    """BERT's masking (Devlin et al., 1810.04805, section 3.1).

    Of every example a share of the tokens, at least one, is chosen: 80 % of them become ``[MASK]``,
    10 % a random token, 10 % stay. Special tokens are never chosen, nor put in.

    Args:
        tokenizer: of the model; has a mask token.
        seed: of the choices.
        whole_words: all pieces of a word are chosen, or none of them (the authors' later models).
        masked, random: of the chosen, the shares that become ``[MASK]`` and a random token.

    Raises:
        ValueError: a tokenizer without a mask token, or whose vocabulary does not say which pieces
            go on with a word.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int = 0,
        whole_words: bool = False,
        masked: float = 0.8,
        random: float = 0.1,
    ):
        if tokenizer.mask_token_id is None:
            raise ValueError(
                "Masking: expected a tokenizer with a mask token, got a "
                f"{type(tokenizer).__name__} without; a masked language model needs one"
            )
        self.seed, self.masked, self.random = seed, masked, random
        self.mask_id = tokenizer.mask_token_id
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self._special = np.zeros(len(tokens), bool)
        self._special[tokenizer.all_special_ids] = True
        self._replacements = np.flatnonzero(~self._special)
        self._continues = None
        if whole_words:
            self._continues = np.array([str(token).startswith("##") for token in tokens])
            if not self._continues.any():
                raise ValueError(
                    "Masking: expected a WordPiece vocabulary (##ing) for whole_words=True, got a "
                    f"{type(tokenizer).__name__} without such pieces; leave whole_words out"
                )

    def __call__(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        examples: np.ndarray,
        *,
        epoch: int | np.ndarray,
        probability: float | np.ndarray = 0.15,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose and hide tokens of a batch.

        Args:
            ids: ``[T]``, their tokens, one example behind the other.
            lengths: ``[B]``, tokens of each.
            examples: ``[B]``, a number of each that is its own in the epoch.
            epoch: another one, other choices; of all or ``[B]``.
            probability: share of the tokens that are chosen, for all or ``[B]``.

        Returns:
            The tokens that the model sees and the labels, int64 ``[T]``: what stood there where a
            token was chosen, `IGNORED` elsewhere.
        """
        ids = np.asarray(ids, np.int64)
        owner = np.repeat(np.arange(len(lengths)), lengths)  # [T]: which example
        place = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        keys = self._keys(np.asarray(examples), epoch)[owner] + place.astype(np.uint64) * _GOLDEN
        free = ~self._special[ids]
        counts = np.bincount(owner[free], minlength=len(lengths))
        wanted = np.maximum(np.floor(np.broadcast_to(probability, counts.shape) * counts + 0.5), 1)
        chosen = self._choose(ids, free, owner, _uniform(keys, 0), wanted)
        labels = np.where(chosen, ids, IGNORED)
        fate, other = _uniform(keys, 1), _uniform(keys, 2)
        random = self._replacements[(other * len(self._replacements)).astype(np.int64)]
        hidden = np.where(fate < self.masked, self.mask_id, ids)
        hidden = np.where(
            (fate >= self.masked) & (fate < self.masked + self.random), random, hidden
        )
        return np.where(chosen, hidden, ids), labels

    def _keys(self, examples: np.ndarray, epoch: int | np.ndarray) -> np.ndarray:
        epochs = np.broadcast_to(np.asarray(epoch), examples.shape).astype(np.uint64)
        run = _mixed(np.full(examples.shape, self.seed, np.uint64) + _GOLDEN) + epochs
        return _mixed(_mixed(run + _GOLDEN) + examples.astype(np.uint64))

    def _choose(
        self,
        ids: np.ndarray,
        free: np.ndarray,
        owner: np.ndarray,
        score: np.ndarray,
        wanted: np.ndarray,
    ) -> np.ndarray:
        """``[T]``: the tokens of those words of each example whose first token has the lowest
        scores, as many as come closest to the number wanted."""
        word = self._first_tokens(ids, free, owner)  # [T]: each token's word, by its first token
        sizes = np.bincount(word[free], minlength=len(ids))
        words = np.flatnonzero(sizes)
        words = words[np.lexsort((score[words], owner[words]))]
        before = np.cumsum(sizes[words]) - sizes[words]
        starts = np.searchsorted(owner[words], owner[words])  # where the words of the example begin
        taken = before - before[starts] + sizes[words] / 2 <= wanted[owner[words]]
        taken[starts] = True
        chosen = np.zeros(len(ids), bool)
        chosen[words] = taken
        return chosen[word] & free

    def _first_tokens(self, ids: np.ndarray, free: np.ndarray, owner: np.ndarray) -> np.ndarray:
        places = np.arange(len(ids))
        if self._continues is None:
            return places
        goes_on = self._continues[ids] & free
        goes_on[:1] = False
        goes_on[1:] &= free[:-1] & (owner[1:] == owner[:-1])
        return np.maximum.accumulate(np.where(goes_on, 0, places))
