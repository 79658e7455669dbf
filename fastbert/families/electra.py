"""ELECTRA (Clark et al., 2003.10555): discriminator and generator. Embeddings may be narrower than
the layers; there is no pooler."""

from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.electra import modeling_electra as hf

from .family import EmbeddingParts, Head, VocabularyHead, like_bert
from .heads import Head as PlainHead
from .heads import MultipleChoiceHead, QuestionAnsweringHead, SequenceHead, TokenHead
from .masked_lm import MaskedLMHead

_VOCABULARY = VocabularyHead(
    modules=("generator_predictions", "generator_lm_head"),
    owners={"generator_predictions": hf.ElectraGeneratorPredictions},
    dense="generator_predictions.dense",
    activation="generator_predictions.activation",
    norm="generator_predictions.LayerNorm",
    decoder="generator_lm_head",
)

FAMILY = like_bert(
    "electra",
    hf,
    "Electra",
    output=BaseModelOutputWithPastAndCrossAttentions,
    sums=EmbeddingParts(projection="embeddings_project"),
    heads={
        "ElectraForMaskedLM": Head(MaskedLMHead, {"vocabulary": _VOCABULARY}),
        "ElectraForPreTraining": Head(SequenceHead),  # the mean is over tokens that are not padding
        "ElectraForSequenceClassification": Head(
            SequenceHead, {"first": {"classifier": hf.ElectraClassificationHead}}
        ),
        # Its summary may be the mean of all columns, as the configuration says.
        "ElectraForMultipleChoice": Head(MultipleChoiceHead, {"keep_padding": True}),
        "ElectraForTokenClassification": Head(TokenHead),
        "ElectraForQuestionAnswering": Head(QuestionAnsweringHead),
        "ElectraForCausalLM": Head(PlainHead),  # a decoder, which runs transformers' code
    },
    row_wise=(hf.ElectraGeneratorPredictions, hf.ElectraDiscriminatorPredictions),
)
