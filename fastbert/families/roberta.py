"""RoBERTa (Liu et al., 1907.11692), and what other families have in common with it: positions that
count tokens, a head that reads the first token of hidden states."""

from types import ModuleType
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.roberta import modeling_roberta

from .family import EmbeddingParts, Family, Head, VocabularyHead, like_bert
from .heads import Head as PlainHead
from .heads import MultipleChoiceHead, QuestionAnsweringHead, SequenceHead, TokenHead
from .masked_lm import MaskedLMHead

_SUMS = EmbeddingParts(counts_tokens=True)


def like_roberta(
    model_type: str,
    code: ModuleType,
    prefix: str,
    sums: EmbeddingParts = _SUMS,
    **different: Any,
) -> Family:
    """A family with RoBERTa's heads under other names.

    Args:
        sums, different: as in `like_bert`.
    """
    lm_head = getattr(code, f"{prefix}LMHead")
    vocabulary = VocabularyHead(
        modules=("lm_head",),
        owners={"lm_head": lm_head},
        dense="lm_head.dense",
        activation_name="gelu",
        norm="lm_head.layer_norm",
        decoder="lm_head.decoder",
    )
    first = {"classifier": getattr(code, f"{prefix}ClassificationHead")}
    return like_bert(
        model_type,
        code,
        prefix,
        output=BaseModelOutputWithPoolingAndCrossAttentions,
        sums=sums,
        heads={
            f"{prefix}ForMaskedLM": Head(MaskedLMHead, {"vocabulary": vocabulary}),
            f"{prefix}ForSequenceClassification": Head(SequenceHead, {"first": first}),
            f"{prefix}ForMultipleChoice": Head(MultipleChoiceHead),
            f"{prefix}ForTokenClassification": Head(TokenHead),
            f"{prefix}ForQuestionAnswering": Head(QuestionAnsweringHead),
            f"{prefix}ForCausalLM": Head(PlainHead),  # a decoder, which runs transformers' code
        },
        row_wise=(lm_head,),
        **different,
    )


FAMILY = like_roberta("roberta", modeling_roberta, "Roberta")
