"""XLM-RoBERTa-XL (Goyal et al., 2105.00572): norms in front, and none behind the embeddings."""

from transformers.models.xlm_roberta_xl import modeling_xlm_roberta_xl

from .family import EmbeddingParts, LayerParts
from .roberta import like_roberta

FAMILY = like_roberta(
    "xlm-roberta-xl",
    modeling_xlm_roberta_xl,
    "XLMRobertaXL",
    parts=LayerParts(
        attention_norm="attention.self_attn_layer_norm",
        output_norm="LayerNorm",
        output_dropout=None,
        pre_norm=True,
    ),
    sums=EmbeddingParts(counts_tokens=True, norm=None),
    calls_layers=True,
    final_norm="encoder.LayerNorm",
)
