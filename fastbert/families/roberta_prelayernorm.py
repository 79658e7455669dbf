"""RoBERTa with its norms in front (as in fairseq's DinkyTrain; Wettig et al., 2202.08005)."""

from transformers.models.roberta_prelayernorm import modeling_roberta_prelayernorm

from .family import LayerParts
from .roberta import like_roberta

FAMILY = like_roberta(
    "roberta-prelayernorm",
    modeling_roberta_prelayernorm,
    "RobertaPreLayerNorm",
    parts=LayerParts(
        attention_norm="attention.LayerNorm", output_norm="intermediate.LayerNorm", pre_norm=True
    ),
    calls_layers=True,
    final_norm="LayerNorm",
)
