"""LayoutLM (Xu et al., 1912.13318): BERT's layers over words and where on a page they stand.
Without boxes all stand in its corner."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.layoutlm import modeling_layoutlm as hf

from .family import EmbeddingParts, Head, VocabularyHead, like_bert
from .heads import QuestionAnsweringHead, SequenceHead, TokenHead
from .masked_lm import MaskedLMHead


def _boxes(
    embeddings: nn.Module,
    arguments: Mapping[str, Any],
    rows: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Tensor:
    """Of the box of each word, ``bbox`` ``[B, S, 4]``: its sides, height and width."""
    across, down = embeddings.x_position_embeddings, embeddings.y_position_embeddings
    high, wide = embeddings.h_position_embeddings, embeddings.w_position_embeddings
    boxes = arguments.get("bbox")
    boxes = torch.zeros(1, 4, dtype=torch.long, device=device) if boxes is None else rows(boxes)
    left, upper, right, lower = boxes.unbind(-1)
    try:
        sides = across(left) + down(upper) + across(right) + down(lower)
        return sides + high(lower - upper) + wide(right - left)
    except IndexError as error:
        raise IndexError(
            f"bbox: expected coordinates and sizes from 0 to {across.weight.shape[0] - 1}, got "
            f"boxes from {boxes.amin(0).tolist()} to {boxes.amax(0).tolist()}"
        ) from error


_VOCABULARY = VocabularyHead(
    modules=("cls",),
    owners={
        "cls": hf.LayoutLMOnlyMLMHead,
        "cls.predictions": hf.LayoutLMLMPredictionHead,
        "cls.predictions.transform": hf.LayoutLMPredictionHeadTransform,
    },
    dense="cls.predictions.transform.dense",
    activation="cls.predictions.transform.transform_act_fn",
    norm="cls.predictions.transform.LayerNorm",
    decoder="cls.predictions.decoder",
)

FAMILY = like_bert(
    "layoutlm",
    hf,
    "LayoutLM",
    output=BaseModelOutputWithPooling,
    sums=EmbeddingParts(
        further=tuple(f"{name}_position_embeddings" for name in "xyhw"),
        further_inputs=("bbox",),
        further_sum=_boxes,
    ),
    heads={
        "LayoutLMForMaskedLM": Head(MaskedLMHead, {"vocabulary": _VOCABULARY}),
        "LayoutLMForSequenceClassification": Head(SequenceHead),
        "LayoutLMForTokenClassification": Head(TokenHead),
        "LayoutLMForQuestionAnswering": Head(QuestionAnsweringHead),
    },
    row_wise=(
        hf.LayoutLMPredictionHeadTransform,
        hf.LayoutLMLMPredictionHead,
        hf.LayoutLMOnlyMLMHead,
    ),
)
