"""BERT's heads as drop-in classes.

Where a parent's forward does the right thing with padded hidden states it stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    TokenClassifierOutput,
)
from transformers.models.bert import modeling_bert as hf
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from ..packing import PackedBatch, PaddedBatch
from . import modules
from .bert import BertModel
from .drop_in import DropIn, twin

__all__ = [
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertLMHeadModel",
]


def _labels_on_padding(labels: Tensor | None, attention_mask: Tensor | None) -> bool:
    """Whether a loss over padded positions is asked for, so that their hidden states matter."""
    if labels is None or attention_mask is None or attention_mask.dim() != 2:
        return False
    if torch.compiler.is_compiling():
        return True  # padding is kept then, so keeping it costs nothing
    return bool(((labels != -100) & (attention_mask.to(labels.device) == 0)).any())


@twin
class BertForPreTraining(DropIn, hf.BertForPreTraining):
    """``transformers.BertForPreTraining``; the masked-LM head runs on real tokens only."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | hf.BertForPreTrainingOutput:
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs, batch = _encode_rows(self, inputs, labels, kwargs)
        rows, pooled = outputs[:2]
        scores, relation = self.cls(rows, pooled)
        loss = None
        if labels is not None and next_sentence_label is not None:
            loss = _token_loss(scores, batch, labels)
            loss = loss + F.cross_entropy(relation.view(-1, 2), next_sentence_label.view(-1))
        return hf.BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=_padded(scores, batch),
            seq_relationship_logits=relation,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


@twin
class BertForMaskedLM(DropIn, hf.BertForMaskedLM):
    """``transformers.BertForMaskedLM``; its head runs on real tokens, other logits are 0."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | MaskedLMOutput:
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        kwargs["encoder_hidden_states"] = encoder_hidden_states
        kwargs["encoder_attention_mask"] = encoder_attention_mask
        outputs, batch = _encode_rows(self, inputs, labels, kwargs)
        scores = self.cls(outputs[0])
        return MaskedLMOutput(
            loss=None if labels is None else _token_loss(scores, batch, labels),
            logits=_padded(scores, batch),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


@twin
class BertForTokenClassification(DropIn, hf.BertForTokenClassification):
    """``transformers.BertForTokenClassification``."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | TokenClassifierOutput:
        keep = _labels_on_padding(labels, attention_mask)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            fastbert_keep_padding=keep,
            **kwargs,
        )


@twin
class BertForQuestionAnswering(DropIn, hf.BertForQuestionAnswering):
    """``transformers.BertForQuestionAnswering``; without labels, padding cannot be an answer.

    Start and end are chosen among all positions, so the logits of padding matter. Without labels
    they are the smallest finite number. With labels, transformers' loss has them in its softmax,
    so such a batch is computed with its padding.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | QuestionAnsweringModelOutput:
        with_labels = start_positions is not None and end_positions is not None
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            start_positions=start_positions,
            end_positions=end_positions,
            fastbert_keep_padding=with_labels,
            **kwargs,
        )
        if attention_mask is not None and attention_mask.dim() == 2 and not with_labels:
            padding = attention_mask.to(output.start_logits.device) == 0
            lowest = torch.finfo(output.start_logits.dtype).min
            output.start_logits = output.start_logits.masked_fill(padding, lowest)
            output.end_logits = output.end_logits.masked_fill(padding, lowest)
        return output


@twin
class BertForSequenceClassification(DropIn, hf.BertForSequenceClassification):
    """``transformers.BertForSequenceClassification``."""


@twin
class BertForMultipleChoice(DropIn, hf.BertForMultipleChoice):
    """``transformers.BertForMultipleChoice``; every choice is a sequence of its own length."""


@twin
class BertForNextSentencePrediction(DropIn, hf.BertForNextSentencePrediction):
    """``transformers.BertForNextSentencePrediction``."""


@twin
class BertLMHeadModel(DropIn, hf.BertLMHeadModel):
    """``transformers.BertLMHeadModel``; as a decoder it runs transformers' code."""


def _encode_rows(
    model: nn.Module,
    inputs: tuple[Tensor | None, ...],
    labels: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[BaseModelOutputWithPoolingAndCrossAttentions, PackedBatch | PaddedBatch | None]:
    """The output of ``model.bert`` with packed rows as its hidden state, and their batch.

    The batch is None, and the hidden state padded, where the base model ran transformers' code, or
    where someone watches the base model and has to see padded tensors.
    """
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
    bert = model.bert
    plain = isinstance(bert, BertModel) and not (
        modules.has_user_hooks(bert) or modules.has_user_hooks(model.cls)
    )
    options = {"fastbert_rows": True} if plain else {}
    if _labels_on_padding(labels, inputs[1]):
        options["fastbert_keep_padding"] = True
    outputs = bert(**dict(zip(names, inputs, strict=True)), return_dict=True, **options, **kwargs)
    return outputs, getattr(outputs, "batch", None)


def _token_loss(scores: Tensor, batch: PackedBatch | PaddedBatch | None, labels: Tensor) -> Tensor:
    """Cross-entropy over labelled tokens, from packed or padded scores."""
    labels = labels.to(scores.device)
    labels = labels.reshape(-1) if batch is None else batch.pack(labels)
    return F.cross_entropy(scores.view(-1, scores.shape[-1]), labels)


def _padded(scores: Tensor, batch: PackedBatch | PaddedBatch | None) -> Tensor:
    return scores if batch is None else batch.unpack(scores)
