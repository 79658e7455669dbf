"""DistilBERT (Sanh et al., 1910.01108): no token types, no pooler, no dropout behind attention."""

from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert import modeling_distilbert as hf

from .family import EmbeddingParts, Family, Head, LayerParts, VocabularyHead
from .heads import MultipleChoiceHead, QuestionAnsweringHead, SequenceHead, TokenHead
from .masked_lm import MaskedLMHead

_VOCABULARY = VocabularyHead(
    modules=("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
    owners={},
    dense="vocab_transform",
    activation="activation",
    norm="vocab_layer_norm",
    decoder="vocab_projector",
)

FAMILY = Family(
    "distilbert",
    hf,
    config=hf.DistilBertConfig,
    model=hf.DistilBertModel,
    embeddings=hf.Embeddings,
    encoder=hf.Transformer,
    layer=hf.TransformerBlock,
    pooler=None,
    output=BaseModelOutput,
    heads={
        "DistilBertForMaskedLM": Head(MaskedLMHead, {"vocabulary": _VOCABULARY}),
        "DistilBertForSequenceClassification": Head(SequenceHead, {"first": {}}),
        "DistilBertForMultipleChoice": Head(MultipleChoiceHead, {"first": {}}),
        "DistilBertForTokenClassification": Head(TokenHead),
        "DistilBertForQuestionAnswering": Head(QuestionAnsweringHead),
    },
    owners={"attention": hf.DistilBertSelfAttention, "ffn": hf.FFN},
    parts=LayerParts(
        attention="attention",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_dropout="attention.dropout",
        attention_output="attention.out_lin",
        hidden_dropout=None,
        attention_norm="sa_layer_norm",
        intermediate="ffn.lin1",
        activation="ffn.activation",
        output="ffn.lin2",
        output_dropout="ffn.dropout",
        output_norm="output_layer_norm",
        chunks="ffn",
    ),
    sums=EmbeddingParts(token_type=None),
    encoder_in="transformer",
    layers=lambda model: model.transformer.layer,
    holders=lambda model: [(model.transformer.layer, nn.ModuleList)],
)
