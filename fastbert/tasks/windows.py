"""Texts that are longer than a model takes, in windows that overlap, for sentence embeddings.

A text's vector is the mean of its windows' vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import LoadError
from .loading import quiet

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase

__all__ = ["Row", "Windows", "encode_rows", "mean_of_windows", "pad_rows"]

_STRIDE = 4  # windows of a text share a quarter of their tokens
Row = dict[str, list[int]]  # ids, types and mask of a text
# The ids of each text as a list: how many there are decides about the batch.
_AS_LISTS = {"common": {"return_tensors": None}, "text": {"padding": False}}
_WHOLE = {**_AS_LISTS, "text": {"padding": False, "truncation": False}}


class Windows:
    """How a model's texts are cut up; the prompt stands in each window.

    Args:
        model: its tokenizer and maximum length count.
        prompt: what is put before every text.

    Raises:
        LoadError: a tokenizer that does not put one token before and one behind a text, or less
            room beside the prompt than windows share.
    """

    def __init__(self, model: SentenceTransformer, prompt: str | None):
        self._max_length = model.max_seq_length
        self._head, self._room = _room(model.tokenizer, prompt, self._max_length)

    def _starts(self, tokens: int) -> range:
        body = tokens - self._head - 1
        step = self._room - self._max_length // _STRIDE
        return range(0, max(body - self._room, 0) + step, step)

    def tokens(self, tokens: int) -> int:
        """Of all windows of a text that has so many with what stands around it."""
        starts = self._starts(tokens)
        again = (len(starts) - 1) * (self._head + 1 + self._max_length // _STRIDE)
        return tokens + again

    def split(self, row: Row) -> list[Row]:
        """A text in windows, each with the first tokens and the last one."""
        head, starts = self._head, self._starts(len(row["input_ids"]))
        return [
            {
                name: [*ids[:head], *ids[head:-1][start : start + self._room], ids[-1]]
                for name, ids in row.items()
            }
            for start in starts
        ]


def mean_of_windows(model: SentenceTransformer, vectors: Tensor, owners: Tensor) -> Tensor:
    """Over the windows of each text, of length 1 where the model's vectors are.

    Args:
        vectors: ``[windows, E]``.
        owners: which text each is of, ``[windows]`` int64, from 0 on, in order; each has one or
            more.

    Returns:
        ``[texts, E]``; the vector of a text with one window is that window's.
    """
    counts = torch.bincount(owners)[:, None]
    total = vectors.new_zeros(len(counts), vectors.shape[1]).index_add(0, owners, vectors)
    means = total / counts
    if type(model[-1]).__name__ == "Normalize":
        means = torch.where(counts > 1, nn.functional.normalize(means, dim=-1), means)
    return means


def encode_rows(
    model: SentenceTransformer, texts: Sequence[str], prompt: str | None, *, whole: bool, **options
) -> tuple[list[Row], dict[str, Any]]:
    """Texts as a model's first module tokenises them, not padded.

    Args:
        whole: they are not cut to the maximum length.
        options: of the module's ``preprocess``.

    Returns:
        Each text, and what is the same for all: the modality, how much of them the prompt is.
    """
    with quiet() if whole else nullcontext():  # transformers warns of long texts
        encoded = model.preprocess(
            list(texts), prompt=prompt, processing_kwargs=_WHOLE if whole else _AS_LISTS, **options
        )
    columns = {name: value for name, value in encoded.items() if isinstance(value, list)}
    shared = {name: value for name, value in encoded.items() if name not in columns}
    return [
        dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
    ], shared


def pad_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """A batch, ``[B, S]`` int64 each, as the tokenizer pads."""
    length = max(len(row["input_ids"]) for row in rows)
    fills = {
        "input_ids": tokenizer.pad_token_id or 0,
        "token_type_ids": tokenizer.pad_token_type_id,
    }
    left, padded = tokenizer.padding_side == "left", {}
    for name in rows[0]:
        grid = np.full((len(rows), length), fills.get(name, 0), dtype=np.int64)
        for line, row in zip(grid, rows, strict=True):
            values = row[name]
            if left:
                line[length - len(values) :] = values
            else:
                line[: len(values)] = values
        padded[name] = torch.from_numpy(grid)
    return padded


def _room(
    tokenizer: PreTrainedTokenizerBase, prompt: str | None, max_length: int
) -> tuple[int, int]:
    """Tokens that stand before the text in every window, and room for the text behind them."""
    if tokenizer.num_special_tokens_to_add() != 2:
        raise LoadError(
            "expected a tokenizer that puts one token before and one behind a text for windows, "
            f"got one that adds {tokenizer.num_special_tokens_to_add()}"
        )
    head = 1 + len(tokenizer(prompt or "", add_special_tokens=False)["input_ids"])
    room = max_length - head - 1
    if room <= max_length // _STRIDE:
        raise LoadError(
            f"expected windows with room for more than {max_length // _STRIDE} tokens beside the "
            f"prompt, got {room} in windows of {max_length}; make them longer"
        )
    return head, room
