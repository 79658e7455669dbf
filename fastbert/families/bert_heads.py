"""BERT's heads as drop-in classes, but for those with a vocabulary (`bert_masked_lm`).

Where a parent's forward does the right thing with padded hidden states it stays as it is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    TokenClassifierOutput,
)
from transformers.models.bert import modeling_bert as hf
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from ..ops.cross_entropy import at_least_one
from .bert import requesting
from .bert_labels import a_share_of_the_step, by_token, labels_on_padding, token_loss
from .drop_in import DropIn, twin

__all__ = [
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertLMHeadModel",
    "packed_span_loss",
]


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
        num_items = kwargs.pop("num_items_in_batch", None)
        labels = by_token(labels, input_ids, inputs_embeds)
        with requesting(self.bert, keep_padding=labels_on_padding(labels, attention_mask)):
            output = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                return_dict=True,
                **kwargs,
            )
        if labels is not None and num_items is not None:
            output.loss = token_loss(output.logits, None, labels, num_items)[0]
        return output


def packed_span_loss(
    output: QuestionAnsweringModelOutput,
    labels: Tensor,
    bounds: Tensor,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """transformers' loss of starts and ends, each over the tokens of its own packed sequence.

    Args:
        output: logits ``[1, T]``.
        labels: ``[B, 2]``, start and end as places in the sequence; one behind its end is ignored.
        bounds: ``[B + 1]``, where sequences begin and end.
        num_items: what each sum is divided by, instead of the number that is not ignored.

    Raises:
        ValueError: another number of labels than of sequences.
    """
    lengths = bounds.diff()
    if labels.shape != (len(lengths), 2):
        raise ValueError(
            f"BertForQuestionAnswering: expected a start and an end for each of {len(lengths)} "
            f"packed sequences, got {labels.shape[0]}"
        )
    device = output.start_logits.device
    labels = labels.to(device).clamp(min=0)
    labels = labels.masked_fill(labels >= lengths[:, None].to(device), -100)
    losses = []
    for logits, right in zip(
        (output.start_logits, output.end_logits), labels.unbind(1), strict=True
    ):
        parts = logits[0].float().split(lengths.tolist())
        padded = nn.utils.rnn.pad_sequence(parts, True, float("-inf"))
        total = F.cross_entropy(padded, right, reduction="sum")
        losses.append(total / at_least_one((right >= 0).sum() if num_items is None else num_items))
    return sum(losses) / 2


@twin
class BertForQuestionAnswering(DropIn, hf.BertForQuestionAnswering):
    """``transformers.BertForQuestionAnswering``; without labels, padding cannot be an answer.

    Start and end are chosen among all positions, so the logits of padding matter. Without labels
    they are the smallest finite number. With labels, transformers' loss has them in its softmax,
    so such a batch is computed with its padding. Of packed sequences (``cu_seq_lens_q``) each has a
    softmax of its own; labels are ``[B]``, places in the sequence.
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
        bounds, labels = kwargs.get("cu_seq_lens_q"), None
        if with_labels and bounds is not None:
            labels = torch.stack([start_positions.flatten(), end_positions.flatten()], 1)
            start_positions = end_positions = None
        with requesting(self.bert, keep_padding=with_labels and labels is None):
            output = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                start_positions=start_positions,
                end_positions=end_positions,
                return_dict=True,
                **kwargs,
            )
        if labels is not None:
            num_items = kwargs.get("num_items_in_batch")
            output.loss = packed_span_loss(output, labels, bounds, num_items)
        if (
            attention_mask is not None
            and attention_mask.dim() == 2
            and not with_labels
            and self.padding == "zeros"
        ):
            padding = attention_mask.to(output.start_logits.device) == 0
            lowest = torch.finfo(output.start_logits.dtype).min
            output.start_logits = output.start_logits.masked_fill(padding, lowest)
            output.end_logits = output.end_logits.masked_fill(padding, lowest)
        return output


@twin
class BertForSequenceClassification(DropIn, hf.BertForSequenceClassification):
    """``transformers.BertForSequenceClassification``."""

    forward = a_share_of_the_step(hf.BertForSequenceClassification.forward)


@twin
class BertForMultipleChoice(DropIn, hf.BertForMultipleChoice):
    """``transformers.BertForMultipleChoice``; every choice is a sequence of its own length.

    Packed sequences (``cu_seq_lens_q``) are choices one behind the other. ``num_choices``, ``[B]``,
    is how many of them each question has; by default all are of one. Logits are ``[B, C]`` for the
    most choices of a question; what others have not is the smallest finite number.
    """

    @a_share_of_the_step
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_choices: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | MultipleChoiceModelOutput:
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        bounds = kwargs.get("cu_seq_lens_q")
        if bounds is None:
            if num_choices is not None:
                raise ValueError(
                    "BertForMultipleChoice: expected num_choices with packed sequences alone, got "
                    "it without cu_seq_lens_q; a padded batch [B, C, S] says itself how many"
                )
            return super().forward(*inputs, labels, return_dict=True, **kwargs)
        outputs = self.bert(*inputs, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output)).flatten()
        counts = [len(logits)] if num_choices is None else num_choices.tolist()
        if sum(counts) != len(logits) or min(counts) < 1:
            raise ValueError(
                "BertForMultipleChoice: expected num_choices to share out the "
                f"{len(logits)} packed sequences, got {counts}"
            )
        lowest = torch.finfo(logits.dtype).min
        logits = nn.utils.rnn.pad_sequence(logits.split(counts), True, lowest)
        return MultipleChoiceModelOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


@twin
class BertForNextSentencePrediction(DropIn, hf.BertForNextSentencePrediction):
    """``transformers.BertForNextSentencePrediction``."""

    forward = a_share_of_the_step(hf.BertForNextSentencePrediction.forward)


@twin
class BertLMHeadModel(DropIn, hf.BertLMHeadModel):
    """``transformers.BertLMHeadModel``; as a decoder it runs transformers' code."""
