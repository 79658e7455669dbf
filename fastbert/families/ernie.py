"""ERNIE (Sun et al., 1904.09223 and 2107.02137): BERT's layers; newer ones also know of tasks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.ernie import modeling_ernie

from .bert import with_berts_heads
from .family import EmbeddingParts


@dataclass
class LabelledErnieOutput(modeling_ernie.ErnieForPreTrainingOutput):
    """Without logits over the vocabulary; see `fastbert.families.masked_lm.LabelledOutput`."""

    num_correct: Tensor | None = None


def _tasks(
    embeddings: nn.Module,
    arguments: Mapping[str, Any],
    rows: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Tensor | None:
    """Of the task that a token is read for, the first one if none is given."""
    table, ids = getattr(embeddings, "task_type_embeddings", None), arguments.get("task_type_ids")
    if table is None:
        return None
    return table(torch.zeros(1, dtype=torch.long, device=device) if ids is None else rows(ids))


FAMILY = with_berts_heads(
    "ernie",
    modeling_ernie,
    "Ernie",
    decoder="ForCausalLM",
    labelled=LabelledErnieOutput,
    sums=EmbeddingParts(
        further=("task_type_embeddings",), further_inputs=("task_type_ids",), further_sum=_tasks
    ),
)
