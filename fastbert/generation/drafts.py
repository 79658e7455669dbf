"""Texts with open places, and what came to stand there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..tasks.errors import InputError

__all__ = ["Draft", "Template"]

_INSIDE = "##"  # how a piece begins that is not the first one of its word

_BEGINS = ("\u0120", "\u2581")  # how words begin for byte-level BPE and for SentencePiece


class Draft(NamedTuple):
    """A text that was written.

    Attributes:
        text: the whole of it; ``words`` are those of the open places.
        ids: of its tokens.
        score: what drafts are ranked by, more is better; what it is says who wrote it.
    """

    text: str
    words: list[str]
    ids: list[int]
    score: float


class Template:
    """A text with masks: every word beside them stays, whole.

    Args:
        ids: tokens of the text, masks among them.
        tokenizer: of these.
        allowed: words that may stand at a mask, by its number from 1; at others all may.
        banned: words that may stand nowhere.

    Attributes:
        open: places of the masks.

    Raises:
        InputError: no mask, a number that no mask has, words that are not one token, or a mask at
            which no word is left.
    """

    def __init__(
        self,
        ids: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        *,
        allowed: Mapping[int, Sequence[str]] | None = None,
        banned: Iterable[str] = (),
    ):
        self.ids, self.tokenizer = list(ids), tokenizer
        self.open = [i for i, token in enumerate(self.ids) if token == tokenizer.mask_token_id]
        if not self.open:
            raise InputError(
                f"expected {tokenizer.mask_token} in the text, got "
                f"{tokenizer.decode(self.ids, skip_special_tokens=True)!r}"
            )
        closed = torch.zeros(len(tokenizer), dtype=torch.bool)
        closed[[*tokenizer.all_special_ids, *map(self._token, banned)]] = True
        pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        inside = torch.tensor([piece.startswith(_INSIDE) for piece in pieces])
        if any(piece.startswith(_BEGINS) for piece in pieces):
            raise InputError(
                f"expected a tokenizer with {_INSIDE} inside of words, as BERT's has it, got a "
                f"{type(tokenizer).__name__}, which marks where words begin; fastbert score is for "
                "it too"
            )
        # Behind a given word the inside of one would make another one of it.
        self._closed = {
            place: closed if place - 1 in self.open else closed | inside for place in self.open
        }
        for number, words in (allowed or {}).items():
            if not 1 <= number <= len(self.open):
                raise InputError(
                    f"expected the number of a mask, 1 to {len(self.open)}, got {number}"
                )
            only = torch.ones_like(closed)
            only[[self._token(word) for word in words]] = False
            place = self.open[number - 1]
            self._closed[place] = only | self._closed[place]
        for number, place in enumerate(self.open, 1):
            if self._closed[place].all():
                raise InputError(
                    f"expected a word that may stand at mask {number}, got constraints that leave "
                    "none: every one that is allowed there is banned"
                )

    @classmethod
    def of(
        cls,
        text: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        length: int | None = None,
        limit: int | None = None,
        allowed: Mapping[int, Sequence[str]] | None = None,
        banned: Iterable[str] = (),
    ) -> Template:
        """From a text.

        Args:
            length: of what stands for its only mask, in tokens; by default one for each mask.
            limit: tokens of a text at most.
            allowed, banned: as the class.

        Raises:
            InputError: as the class; an empty text, several masks with a length, or a text that is
                too long.
        """
        mask = tokenizer.mask_token
        if not text.strip():
            raise InputError(f"expected a text with {mask}, got an empty one")
        if length is not None:
            if text.count(mask) != 1:
                raise InputError(
                    f"expected one {mask} in the text that a length is given for, got "
                    f"{text.count(mask)}"
                )
            if length < 1:
                raise InputError(f"expected a length of 1 token or more, got {length}")
            text = text.replace(mask, " ".join([mask] * length))
        ids = tokenizer(text, verbose=False)["input_ids"]
        if limit is not None and len(ids) > limit:
            raise InputError(
                f"expected at most {limit} tokens, the positions that the model knows, got "
                f"{len(ids)}; shorten the text"
            )
        return cls(ids, tokenizer, allowed=allowed, banned=banned)

    def _token(self, word: str) -> int:
        pieces = self.tokenizer.tokenize(word)
        if len(pieces) != 1 or pieces[0] == self.tokenizer.unk_token:
            raise InputError(
                f"expected a word that is one token of the model, got {word!r}: "
                f"{' '.join(pieces) or 'nothing'}"
            )
        return self.tokenizer.convert_tokens_to_ids(pieces[0])

    def open_only(self, log_probs: Tensor, places: Sequence[int]) -> Tensor:
        """Without the words that may not stand at ``places``: ``[places, V]``, a distribution."""
        closed = torch.stack([self._closed[place] for place in places]).to(log_probs.device)
        width = log_probs.shape[-1] - closed.shape[-1]  # rows of the vocabulary without a word
        closed = torch.nn.functional.pad(closed, (0, width), value=True)
        return log_probs.masked_fill(closed, float("-inf")).log_softmax(-1)

    def draft(self, ids: Sequence[int], score: float) -> Draft:
        """What was written there."""
        words = [self.tokenizer.convert_ids_to_tokens(ids[place]) for place in self.open]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Draft(re.sub(r" ([.,;:!?])", r"\1", text), words, list(ids), score)
