"""BertGeneration (Rothe et al., 1907.12461): BERT as the encoder, and the decoder, of a sequence to
sequence model. The encoder is packed; no token types, no pooler."""

from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert_generation import modeling_bert_generation as hf

from .family import EmbeddingParts, Head, like_bert
from .heads import Head as PlainHead

FAMILY = like_bert(
    "bert-generation",
    hf,
    "BertGeneration",
    model=hf.BertGenerationEncoder,
    encoder=hf.BertEncoder,
    output=BaseModelOutputWithPastAndCrossAttentions,
    heads={"BertGenerationDecoder": Head(PlainHead)},  # which runs transformers' code
    sums=EmbeddingParts(token_type=None),
)
