"""Megatron's BERT (Shoeybi et al., 1909.08053): norms in front, and none behind the embeddings."""

from dataclasses import dataclass

from torch import Tensor
from transformers.models.megatron_bert import modeling_megatron_bert

from .bert import with_berts_heads
from .family import EmbeddingParts, LayerParts


@dataclass
class LabelledMegatronBertOutput(modeling_megatron_bert.MegatronBertForPreTrainingOutput):
    """Without logits over the vocabulary; see `fastbert.families.masked_lm.LabelledOutput`."""

    num_correct: Tensor | None = None


FAMILY = with_berts_heads(
    "megatron-bert",
    modeling_megatron_bert,
    "MegatronBert",
    decoder="ForCausalLM",
    labelled=LabelledMegatronBertOutput,
    parts=LayerParts(attention_norm="attention.ln", output_norm="ln", pre_norm=True),
    sums=EmbeddingParts(norm=None),
    calls_layers=True,
    final_norm="encoder.ln",
)
