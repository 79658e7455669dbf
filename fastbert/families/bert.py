"""BERT (Devlin et al., 1810.04805)."""

from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert import modeling_bert as hf

from .family import Head, VocabularyHead, like_bert
from .heads import Head as PlainHead
from .heads import MultipleChoiceHead, QuestionAnsweringHead, SequenceHead, TokenHead
from .masked_lm import MaskedLMHead, PreTrainingHead


def _vocabulary(outer: type) -> VocabularyHead:
    return VocabularyHead(
        modules=("cls",),
        owners={
            "cls": outer,
            "cls.predictions": hf.BertLMPredictionHead,
            "cls.predictions.transform": hf.BertPredictionHeadTransform,
        },
        dense="cls.predictions.transform.dense",
        activation="cls.predictions.transform.transform_act_fn",
        norm="cls.predictions.transform.LayerNorm",
        decoder="cls.predictions.decoder",
    )


FAMILY = like_bert(
    "bert",
    hf,
    "Bert",
    output=BaseModelOutputWithPoolingAndCrossAttentions,
    heads={
        "BertForMaskedLM": Head(MaskedLMHead, {"vocabulary": _vocabulary(hf.BertOnlyMLMHead)}),
        "BertForPreTraining": Head(
            PreTrainingHead, {"vocabulary": _vocabulary(hf.BertPreTrainingHeads)}
        ),
        "BertForSequenceClassification": Head(SequenceHead),
        "BertForNextSentencePrediction": Head(SequenceHead),
        "BertForMultipleChoice": Head(MultipleChoiceHead),
        "BertForTokenClassification": Head(TokenHead),
        "BertForQuestionAnswering": Head(QuestionAnsweringHead),
        "BertLMHeadModel": Head(PlainHead),  # a decoder, which runs transformers' code
    },
    row_wise=(
        hf.BertPredictionHeadTransform,
        hf.BertLMPredictionHead,
        hf.BertOnlyMLMHead,
        hf.BertOnlyNSPHead,
        hf.BertPreTrainingHeads,
    ),
)
