"""What a masked language model says of single places of many texts, packed.

The vocabulary is by far the widest product of a small BERT, and only masked places need it: hidden
states of all tokens are computed, the head runs on the places that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..families.model import first_position
from ..tasks.errors import InputError
from ..tasks.loading import load_model, load_tokenizer, max_length_of

__all__ = ["MaskedModel", "neighbours"]

_TOKENS = 8192  # of a forward pass
_PLACES = 1024  # rows of the vocabulary that are in memory at a time


class MaskedModel:
    """A masked language model and its tokenizer.

    Args:
        model: a masked-LM model of fastbert's in evaluation mode.
        tokenizer: of its vocabulary.

    Raises:
        InputError: a tokenizer without a mask.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.mask_token_id is None:
            raise InputError("expected a tokenizer with a mask token, got one without")
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        allow_pickle: bool = False,
    ) -> MaskedModel:
        """From a local folder or a hub name, with frozen weights.

        Raises:
            LoadError: no such model, or one without a masked-LM head.
            InputError: a tokenizer without a mask.
        """
        model = load_model(
            "ForMaskedLM", source, device=device, dtype=dtype, allow_pickle=allow_pickle,
            frozen=True,
        )  # fmt: skip
        return cls(model, load_tokenizer(source))

    @property
    def limit(self) -> int:
        """Tokens of a text at most, first and last ones included."""
        return max_length_of(self.model.config)

    @torch.inference_mode()
    def log_probs(
        self, texts: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
    ) -> Iterator[Tensor]:
        """Logarithms of the probabilities of all words, at some places of each text.

        Args:
            texts: token ids, masks among them; at most `limit`.
            places: of each text, at least one.

        Yields:
            For each text in turn ``[places, V]``, fp32, on the device of the model.
        """
        lengths = [len(ids) for ids in texts]
        rows_each = [len(each) for each in places]
        for start, end in neighbours(lengths, _TOKENS, rows_each, _PLACES):
            firsts, hidden = self._hidden(texts[start:end])
            rows = [first + place for first, each in zip(firsts, places[start:end], strict=True)
                    for place in each]  # fmt: skip
            chosen = hidden.index_select(0, torch.tensor(rows, device=hidden.device))
            scores = self.model.scores(chosen).float().log_softmax(-1)
            yield from scores.split(rows_each[start:end])

    def _hidden(self, texts: Sequence[Sequence[int]]) -> tuple[list[int], Tensor]:
        """Where each text begins, and hidden states of all tokens, ``[T, E]``."""
        device, lengths = self.model.device, [len(ids) for ids in texts]
        ends = list(accumulate(lengths, initial=0))
        bounds = torch.tensor(ends, dtype=torch.int32, device=device)
        first = first_position(self.model)
        found = self.model.base_model(
            torch.tensor([[token for ids in texts for token in ids]], device=device),
            position_ids=torch.tensor(
                [[first + place for length in lengths for place in range(length)]], device=device
            ),
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=max(lengths),
            max_length_k=max(lengths),
        )
        return ends[:-1], found.last_hidden_state[0]


def neighbours(
    sizes: Sequence[int], most: int, others: Sequence[int] | None = None, most_others: int = 0
) -> Iterator[tuple[int, int]]:
    """What is done together: first and one behind the last, of at most so much of one size and of
    another one, or alone."""
    start = total = other = 0
    for i, (size, also) in enumerate(zip(sizes, others or [0] * len(sizes), strict=True)):
        if i > start and (total + size > most or other + also > most_others):
            yield start, i
            start, total, other = i, 0, 0
        total, other = total + size, other + also
    if start < len(sizes):
        yield start, len(sizes)
