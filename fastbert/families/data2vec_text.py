"""The text encoder of data2vec (Baevski et al., 2202.03555)."""

from transformers.models.data2vec import modeling_data2vec_text

from .roberta import like_roberta

FAMILY = like_roberta("data2vec-text", modeling_data2vec_text, "Data2VecText")
