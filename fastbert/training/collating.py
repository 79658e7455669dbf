"""Examples to a batch: packed, or padded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..families.drop_in import DropIn
from ..families.model import first_position
from .masking import IGNORED, Masking

__all__ = ["PackedCollator", "check_packs"]


def check_packs(model: nn.Module) -> None:
    """Refuse a model that packed batches are not for.

    Raises:
        TypeError: no drop-in class inside. transformers' own BERT takes a packed row for one
            sequence: its sequences would attend to each other, without a word.
    """
    if not any(isinstance(module, DropIn) for module in model.modules()):
        raise TypeError(
            "PackedCollator: expected a model that keeps packed sequences apart, got a "
            f"{type(model).__name__}, in which they would attend to each other; call "
            "fastbert.accelerate(model) first, load it with fastbert's class, or use padded=True"
        )


class PackedCollator:
    """Makes one batch of examples, for ``collate_fn=`` of a DataLoader or a Trainer's
    ``data_collator=``.

    An example is a mapping, as tokenizers and `datasets` give it:

    ===================================  ==========================================================
    ``input_ids``                        ``[n]``
    ``token_type_ids``                   ``[n]``
    ``attention_mask``                   ``[n]``; where it is 0 nothing of the example is taken
    ``labels``, ``label``                ``[n]``, one for each token; or a number, or a vector as
                                         long as every other example's, for the sequence
    ``next_sentence_label``              a number
    ``start_positions, end_positions``   numbers: places in the example
    ===================================  ==========================================================

    An example may be a question with choices: what it has of tokens is a list for each choice then,
    each of its own length. ``num_choices``, int64 ``[B]``, says how many each example has; padded
    batches are ``[B, C, S]`` and take as many of every example.

    Packed, a batch is one row of ``T`` tokens: ``input_ids``, ``token_type_ids``, ``position_ids``
    (for each sequence from the model's first on) and token labels int64 ``[1, T]``;
    ``cu_seq_lens_q`` and ``cu_seq_lens_k``, int32 ``[B + 1]``, where sequences begin and end;
    ``max_length_q`` and ``max_length_k``, the longest; everything of a sequence ``[B]``. Padded it
    is ``[B, S]`` with an ``attention_mask``.

    Args:
        model: what the batches are for; it is looked at and not kept. Not needed where ``padded``.
        padded: make padded batches.
        pad_token_id: what padding is.
        masking: hides tokens and makes the labels; examples have ``example`` and ``epoch`` then,
            numbers that say which they are, and may have ``probability``.
        labels: ``"token"`` or ``"sequence"``, what ``labels`` are of; by default of tokens where
            every example has as many as tokens.

    Raises:
        TypeError: a model that would let packed sequences attend to each other.
        ValueError: examples without tokens, of different keys, or labels that do not fit.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        padded: bool = False,
        pad_token_id: int = 0,
        masking: Masking | None = None,
        labels: str | None = None,
    ):
        if labels not in (None, "token", "sequence"):
            raise ValueError(
                f"PackedCollator: expected labels to be 'token' or 'sequence', got {labels!r}"
            )
        if not padded:
            if model is None:
                raise TypeError(
                    "PackedCollator: expected the model that packed batches are for, got none; "
                    "pass it, or padded=True"
                )
            check_packs(model)
        self.padded, self.pad_token_id = padded, pad_token_id
        self._first = 0 if model is None else first_position(model)
        self.masking, self.labels = masking, labels

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        columns = _columns(examples)
        counts = _flatten_choices(columns)
        if counts is not None and self.masking is not None:
            raise ValueError("PackedCollator: expected examples without choices for masking")
        tokens = {"input_ids": columns.pop("input_ids")}
        lengths = np.array([len(ids) for ids in tokens["input_ids"]])
        if "token_type_ids" in columns:
            tokens["token_type_ids"] = columns.pop("token_type_ids")
        if counts is None and self._are_of_tokens(columns.get("labels"), lengths):
            tokens["labels"] = columns.pop("labels")
        keep = [np.asarray(mask) != 0 for mask in columns.pop("attention_mask", ())]
        rows = {name: _flat(name, values, lengths, keep) for name, values in tokens.items()}
        if keep:
            lengths = np.array([mask.sum() for mask in keep])
        for index in np.flatnonzero(lengths == 0)[:1]:
            raise ValueError(
                "PackedCollator: expected a token or more in every example, got none in example "
                f"{index} of the batch; leave it out"
            )
        if self.masking is not None:
            rows.update(self._masked(rows["input_ids"], lengths, columns))
        make = self._padded if self.padded else self._packed
        batch = make({name: torch.from_numpy(values) for name, values in rows.items()}, lengths)
        if counts is not None:
            batch = self._by_question(batch, counts)
        return batch | {name: _of_sequences(name, values) for name, values in columns.items()}

    def _by_question(self, batch: dict[str, Any], counts: list[int]) -> dict[str, Any]:
        if not self.padded:
            return {**batch, "num_choices": torch.tensor(counts)}
        if len(set(counts)) > 1:
            raise ValueError(
                "PackedCollator: expected as many choices in every example of a padded batch, got "
                f"{counts}; packed batches take any number"
            )
        return {name: values.unflatten(0, (-1, counts[0])) for name, values in batch.items()}

    def _are_of_tokens(self, labels: list | None, lengths: np.ndarray) -> bool:
        if labels is None or self.labels == "sequence":
            return False
        shapes = [np.asarray(label).shape for label in labels]
        fit = shapes == [(length,) for length in lengths]
        if self.labels == "token" and not fit:
            raise ValueError(
                "PackedCollator: expected a label for each token of every example, got "
                f"{[*map(math.prod, shapes)]} for {lengths.tolist()} tokens"
            )
        return fit

    def _masked(
        self, ids: np.ndarray, lengths: np.ndarray, columns: dict[str, list]
    ) -> dict[str, np.ndarray]:
        if "example" not in columns:
            raise ValueError(
                "PackedCollator: expected examples to have a number ('example') for masking, got "
                "none; without it what is masked would depend on the batch"
            )
        epochs = columns.pop("epoch", [0])
        hidden, labels = self.masking(
            ids,
            lengths,
            np.array(columns.pop("example")),
            epoch=np.broadcast_to(epochs, lengths.shape),
            probability=np.array(columns.pop("probability", 0.15)),
        )
        return {"input_ids": hidden, "labels": labels}

    def _packed(self, rows: dict[str, Tensor], lengths: np.ndarray) -> dict[str, Any]:
        ends = np.concatenate([[0], np.cumsum(lengths)])
        bounds = torch.from_numpy(ends.astype(np.int32))
        positions = self._first + np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)
        longest = int(lengths.max())
        return {
            **{name: values[None] for name, values in rows.items()},
            "position_ids": torch.from_numpy(positions)[None],
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def _padded(self, rows: dict[str, Tensor], lengths: np.ndarray) -> dict[str, Tensor]:
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED}
        sizes = torch.from_numpy(lengths)
        mask = torch.arange(int(lengths.max())) < sizes[:, None]
        padded = {}
        for name, values in rows.items():
            padded[name] = torch.full(mask.shape, fill.get(name, 0), dtype=values.dtype)
            padded[name][mask] = values
        return {**padded, "attention_mask": mask.long()}


def _columns(examples: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """Examples by key, ``label`` as ``labels``."""
    keys = set(examples[0])
    for index, example in enumerate(examples):
        if set(example) != keys:
            raise ValueError(
                "PackedCollator: expected the same keys in every example, got "
                f"{sorted(map(str, set(example) ^ keys))} in some only (example {index})"
            )
    if "input_ids" not in keys:
        raise ValueError(f"PackedCollator: expected input_ids, got {sorted(map(str, keys))}")
    return {
        "labels" if key == "label" else key: [example[key] for example in examples]
        for key in examples[0]
    }


def _flatten_choices(columns: dict[str, list]) -> list[int] | None:
    """Choices as sequences one behind the other, in place, and how many each example has; None for
    examples that are a sequence each."""
    rows = columns["input_ids"]
    if not all(len(ids) and np.ndim(ids[0]) for ids in rows):
        return None
    counts = [len(choices) for choices in rows]
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        if name not in columns:
            continue
        if [len(choices) for choices in columns[name]] != counts:
            raise ValueError(
                f"PackedCollator: expected {name} for each of {counts} choices, got "
                f"{[len(choices) for choices in columns[name]]}"
            )
        columns[name] = [sequence for choices in columns[name] for sequence in choices]
    return counts


def _flat(name: str, values: list, lengths: np.ndarray, keep: list[np.ndarray]) -> np.ndarray:
    """What every token has, int64 ``[T]``, of the tokens that are kept."""
    arrays = [np.asarray(value) for value in values]
    for index, (array, length) in enumerate(zip(arrays, lengths, strict=True)):
        if array.shape != (length,):
            raise ValueError(
                f"PackedCollator: expected {length} {name}, as many as tokens, got shape "
                f"{array.shape} in example {index} of the batch"
            )
    if keep:
        arrays = [array[mask] for array, mask in zip(arrays, keep, strict=True)]
    return np.concatenate(arrays).astype(np.int64, copy=False)


def _of_sequences(name: str, values: list) -> Tensor:
    try:
        found = torch.as_tensor(np.array(values))
    except (TypeError, ValueError):
        raise ValueError(
            f"PackedCollator: expected numbers, as many in every example, in {name!r}, got "
            f"{values[0]!r} first; leave out columns that the model does not take"
        ) from None
    return found.float() if found.dtype == torch.float64 else found
