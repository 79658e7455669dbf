"""ALBERT (Lan et al., 1909.11942): a few layers that run several times, and narrow embeddings."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.albert import modeling_albert as hf

from .family import EmbeddingParts, Family, Head, LayerParts, VocabularyHead
from .heads import Head as PlainHead
from .heads import MultipleChoiceHead, QuestionAnsweringHead, SequenceHead, TokenHead
from .masked_lm import MaskedLMHead

_VOCABULARY = VocabularyHead(
    modules=("predictions",),
    owners={"predictions": hf.AlbertMLMHead},
    dense="predictions.dense",
    activation="predictions.activation",
    norm="predictions.LayerNorm",
    decoder="predictions.decoder",
)


def _layers(model: nn.Module) -> list[nn.Module]:
    config, groups = model.config, model.encoder.albert_layer_groups
    each = config.num_hidden_layers / config.num_hidden_groups  # as transformers has it
    chosen = (groups[int(i / each)] for i in range(config.num_hidden_layers))
    return [layer for group in chosen for layer in group.albert_layers]


def _holders(model: nn.Module) -> list[tuple[nn.Module, type]]:
    groups = model.encoder.albert_layer_groups
    found: list[tuple[nn.Module, type]] = [(groups, nn.ModuleList)]
    for group in groups:
        found += [(group, hf.AlbertLayerGroup), (group.albert_layers, nn.ModuleList)]
    return found


def _pool(model: nn.Module, hidden: Tensor) -> Tensor:
    return model.pooler_activation(model.pooler(hidden[:, 0]))


FAMILY = Family(
    "albert",
    hf,
    config=hf.AlbertConfig,
    model=hf.AlbertModel,
    embeddings=hf.AlbertEmbeddings,
    encoder=hf.AlbertTransformer,
    layer=hf.AlbertLayer,
    pooler=nn.Linear,
    output=BaseModelOutputWithPooling,
    heads={
        "AlbertForMaskedLM": Head(MaskedLMHead, {"vocabulary": _VOCABULARY}),
        "AlbertForPreTraining": Head(PlainHead),
        "AlbertForSequenceClassification": Head(SequenceHead),
        "AlbertForMultipleChoice": Head(MultipleChoiceHead),
        "AlbertForTokenClassification": Head(TokenHead),
        "AlbertForQuestionAnswering": Head(QuestionAnsweringHead),
    },
    owners={"attention": hf.AlbertAttention},
    row_wise=(hf.AlbertMLMHead,),
    parts=LayerParts(
        attention="attention",
        query="attention.query",
        key="attention.key",
        value="attention.value",
        attention_dropout="attention.attention_dropout",
        attention_output="attention.dense",
        hidden_dropout="attention.output_dropout",
        attention_norm="attention.LayerNorm",
        intermediate="ffn",
        activation="activation",
        output="ffn_output",
        output_dropout=None,
        output_norm="full_layer_layer_norm",
    ),
    sums=EmbeddingParts(projection="encoder.embedding_hidden_mapping_in"),
    layers=_layers,
    holders=_holders,
    pool=_pool,
    calls_layers=True,
)
