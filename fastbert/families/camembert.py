"""CamemBERT (Martin et al., 1911.03894)."""

from transformers.models.camembert import modeling_camembert

from .roberta import like_roberta

FAMILY = like_roberta("camembert", modeling_camembert, "Camembert")
