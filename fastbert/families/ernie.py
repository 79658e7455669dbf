"""ERNIE (Sun et al., 1904.09223 and 2107.02137): BERT's layers; newer ones also know of tasks."""

from dataclasses import dataclass

from torch import Tensor
from transformers.models.ernie import modeling_ernie

from .bert import with_berts_heads
from .family import EmbeddingParts


@dataclass
class LabelledErnieOutput(modeling_ernie.ErnieForPreTrainingOutput):
    """Without logits over the vocabulary; see `fastbert.families.masked_lm.LabelledOutput`."""

    num_correct: Tensor | None = None


FAMILY = with_berts_heads(
    "ernie",
    modeling_ernie,
    "Ernie",
    decoder="ForCausalLM",
    labelled=LabelledErnieOutput,
    sums=EmbeddingParts(task_type="task_type_embeddings"),
)
