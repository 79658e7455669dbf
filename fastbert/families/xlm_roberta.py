"""XLM-RoBERTa (Conneau et al., 1911.02116): E5, BGE-M3 and many rerankers."""

from transformers.models.xlm_roberta import modeling_xlm_roberta

from .roberta import like_roberta

FAMILY = like_roberta("xlm-roberta", modeling_xlm_roberta, "XLMRoberta")
