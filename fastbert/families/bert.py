"""BERT (Devlin et al., 1810.04805), and what families with all of its heads share with it."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert import modeling_bert

from .family import Family, Head, VocabularyHead, like_bert
from .heads import Head as PlainHead
from .heads import MultipleChoiceHead, QuestionAnsweringHead, SequenceHead, TokenHead
from .masked_lm import MaskedLMHead, PreTrainingHead


def with_berts_heads(
    model_type: str,
    code: ModuleType,
    prefix: str,
    *,
    decoder: str,
    labelled: type,
    **different: Any,
) -> Family:
    """A family with BERT's layers and heads under other names.

    Args:
        decoder: the name of its class with a language-model head.
        labelled: an output of pre-training with ``num_correct``.
        different: as in `like_bert`.
    """

    def named(rest: str) -> Any:
        return getattr(code, prefix + rest)

    def vocabulary(outer: str) -> dict[str, VocabularyHead]:
        head = VocabularyHead(
            modules=("cls",),
            owners={
                "cls": named(outer),
                "cls.predictions": named("LMPredictionHead"),
                "cls.predictions.transform": named("PredictionHeadTransform"),
            },
            dense="cls.predictions.transform.dense",
            activation="cls.predictions.transform.transform_act_fn",
            norm="cls.predictions.transform.LayerNorm",
            decoder="cls.predictions.decoder",
        )
        return {"vocabulary": head}

    outputs = {"output": named("ForPreTrainingOutput"), "labelled": labelled}
    heads = {
        "ForMaskedLM": Head(MaskedLMHead, vocabulary("OnlyMLMHead")),
        "ForPreTraining": Head(PreTrainingHead, vocabulary("PreTrainingHeads") | outputs),
        "ForSequenceClassification": Head(SequenceHead),
        "ForNextSentencePrediction": Head(SequenceHead),
        "ForMultipleChoice": Head(MultipleChoiceHead),
        "ForTokenClassification": Head(TokenHead),
        "ForQuestionAnswering": Head(QuestionAnsweringHead),
        decoder: Head(PlainHead),  # which runs transformers' code
    }
    parts = ("PredictionHeadTransform", "LMPredictionHead", "OnlyMLMHead", "OnlyNSPHead",
             "PreTrainingHeads")  # fmt: skip
    return like_bert(
        model_type,
        code,
        prefix,
        output=BaseModelOutputWithPoolingAndCrossAttentions,
        heads={prefix + name: head for name, head in heads.items()},
        row_wise=tuple(map(named, parts)),
        **different,
    )


@dataclass
class LabelledBertOutput(modeling_bert.BertForPreTrainingOutput):
    """Without logits over the vocabulary; see `fastbert.families.masked_lm.LabelledOutput`."""

    num_correct: Tensor | None = None


FAMILY = with_berts_heads(
    "bert", modeling_bert, "Bert", decoder="LMHeadModel", labelled=LabelledBertOutput
)
