"""What a model with a head says of examples, packed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..tasks.errors import LoadError
from ..tasks.loading import load_model, load_tokenizer
from ..training.collating import PackedCollator
from ..training.sampling import TokenBudgetSampler
from .table import Table
from .tasks import Task, task_from_config

__all__ = ["Predictor", "logits_of"]

_INPUTS = ("input_ids", "token_type_ids")
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
    """The logits of each example, ``[C]`` of a sequence or ``[n, C]`` of its tokens, with its place
    among ``examples``, in no order that means anything.

    Args:
        model: in evaluation mode, on ``device``.
        tokens: of a forward pass at most; the longest example, if that is more.
        rank, world_size: which share of the examples, of how many.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    collate = PackedCollator(model)
    batches = TokenBudgetSampler(
        lengths, max(tokens, *lengths), rank=0, world_size=1, shuffle=False
    )
    for batch in list(batches)[rank::world_size]:
        inputs = collate([{k: examples[i][k] for k in _INPUTS if k in examples[i]} for i in batch])
        inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs.items()}
        logits: Tensor = model(**inputs).logits.float().cpu()
        if task.labels_of == "token":
            parts = logits[0].split([lengths[i] for i in batch])
        else:
            parts = logits.unbind(0)
        yield from zip(batch, (part.numpy() for part in parts), strict=True)


class Predictor:
    """A checkpoint with a head, ours or any of transformers', and what it is for.

    Args:
        source: a folder, or a name on the Hugging Face hub.
        device: where it runs.
        dtype: of its weights.
        max_length: tokens of an example at most; by default as many as the model knows.

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
    ):
        self.device = device
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(source)
        config = AutoConfig.from_pretrained(source)
        self.task = task_from_config(config)
        known = min(config.max_position_embeddings, self.tokenizer.model_max_length)
        if max_length is not None and max_length > config.max_position_embeddings:
            raise LoadError(
                f"expected a --max-length of at most {config.max_position_embeddings}, the "
                f"positions that the model knows, got {max_length}"
            )
        self.max_length = max_length or known
        self.model: PreTrainedModel = load_model(
            self.task.head, source, device=device, dtype=dtype, frozen=True
        )

    def __call__(self, table: Table) -> tuple[list[Any], list[dict[str, Any]], int]:
        """Predictions for each row, the same as JSON, and how many rows were cut."""
        examples, cut = self.task.encode(table, self.tokenizer, self.max_length)
        said = dict(logits_of(self.model, self.task, examples, self.device))
        rows = [(said[i], example) for i, example in enumerate(examples)]
        predictions = [self.task.predict(*row) for row in rows]
        return predictions, [self.task.describe(*row) for row in rows], cut
