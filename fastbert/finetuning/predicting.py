"""What a model with a head says of examples, packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..tasks.errors import LoadError
from ..tasks.loading import load_config, load_model, load_tokenizer, max_length_of
from ..training.collating import PackedCollator
from ..training.sampling import TokenBudgetSampler
from .kinds import task_from_config
from .table import Table
from .tasks import INPUTS, Example, Task, tokens_of

__all__ = ["Predictor", "logits_of", "said_of"]

BATCH_TOKENS = 8192  # of a forward pass


@torch.no_grad()
def logits_of(
    model: nn.Module,
    task: Task,
    examples: list[dict[str, Any]],
    device: torch.device,
    *,
    tokens: int = BATCH_TOKENS,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[int, np.ndarray]]:
    """The logits of each example, as `Task.logits`, with its place among ``examples``.

    Args:
        model: in evaluation mode, on ``device``.
        tokens: of a forward pass at most; the longest example, if that is more.
        rank, world_size: which share of the examples, of how many.
    """
    lengths = [*map(tokens_of, examples)]
    collate = PackedCollator(model)
    batches = TokenBudgetSampler(
        lengths, max(tokens, *lengths), rank=0, world_size=1, shuffle=False
    )
    for batch in list(batches)[rank::world_size]:
        inputs = collate([{k: examples[i][k] for k in INPUTS if k in examples[i]} for i in batch])
        inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs.items()}
        found = task.logits(model(**inputs), [lengths[i] for i in batch])
        yield from zip(batch, found, strict=True)


def said_of(task: Task, logits: Mapping[int, np.ndarray], examples: list[Example]) -> list[Any]:
    """What the logits of all examples say of each row, by `Task.merge`."""
    parts: dict[int, list[tuple[np.ndarray, Example]]] = {}
    for i, example in enumerate(examples):
        parts.setdefault(example["row"], []).append((logits[i], example))
    return [task.merge(parts[row]) for row in sorted(parts)]


class Predictor:
    """A checkpoint with a head, ours or any of transformers', and what it is for.

    Args:
        source: a folder, or a name on the Hugging Face hub.
        device: where it runs.
        dtype: of its weights.
        max_length: tokens of an example at most; by default as many as the model knows.
        windows: longer rows are read in windows that overlap; otherwise they are cut.

    Raises:
        LoadError: no such model, or one without a head.
        InputError: a head for something else, or a longer ``max_length`` than the model knows.
    """

    def __init__(
        self,
        source: str | Path,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        max_length: int | None = None,
        *,
        windows: bool = False,
    ):
        self.device, self.windows = device, windows
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(source)
        config = load_config(source)
        self.task = task_from_config(config)
        positions = max_length_of(config)
        if max_length is not None and max_length > positions:
            raise LoadError(
                f"expected a --max-length of at most {positions}, the positions that the model "
                f"knows, got {max_length}"
            )
        self.max_length = max_length or min(positions, self.tokenizer.model_max_length)
        self.model: PreTrainedModel = load_model(
            self.task.head, source, device=device, dtype=dtype, frozen=True
        )
        self.task.check_model(self.model)

    def __call__(self, table: Table) -> tuple[list[Any], list[dict[str, Any]], int]:
        """Predictions for each row, the same as JSON, and how many rows were cut."""
        said, cut = self.said(table)
        return [*map(self.task.predict, said)], [*map(self.task.describe, said)], cut

    def said(self, table: Table) -> tuple[list[Any], int]:
        """What the model says of each row, as `Task.merge`, and how many rows were longer."""
        examples, cut = self.task.encode(
            table, self.tokenizer, self.max_length, windows=self.windows
        )
        logits = dict(logits_of(self.model, self.task, examples, self.device))
        return said_of(self.task, logits, examples), cut
