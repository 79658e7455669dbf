"""BERT's heads as drop-in classes.

Where a parent's forward does the right thing with padded hidden states it stays as it is. The
masked-LM head runs on real tokens, and with ``skip_logits`` on labelled ones (`_LabelledTokens`).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    TokenClassifierOutput,
)
from transformers.models.bert import modeling_bert as hf
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .. import ops
from ..encoder import Linear, Norm
from ..ops.cross_entropy import at_least_one, labelled_rows, summed_cross_entropy
from ..packing import PackedBatch
from . import known, modules
from .bert import Call, requesting
from .bert_obstacle import say_once
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


def _by_token(
    labels: Tensor | None, input_ids: Tensor | None, inputs_embeds: Tensor | None
) -> Tensor | None:
    """Labels ``[B, S]``, which may have come flat.

    Raises:
        ValueError: another number of them.
    """
    x = inputs_embeds if input_ids is None else input_ids
    if labels is None or x is None:
        return labels
    if labels.numel() != x.shape[:2].numel():
        raise ValueError(  # its first line is torch's
            f"Expected input batch_size ({x.shape[:2].numel()}) to match target batch_size "
            f"({labels.numel()}).\nlabels: expected one for each token of the input "
            f"{tuple(x.shape[:2])}, got {tuple(labels.shape)}"
        )
    return labels.reshape(x.shape[:2])


def _labels_on_padding(labels: Tensor | None, attention_mask: Tensor | None) -> bool:
    """Whether a loss over padded positions is asked for, so that their hidden states matter."""
    if labels is None or attention_mask is None or attention_mask.dim() != 2:
        return False
    if torch.compiler.is_compiling():
        return True  # padding is kept then, so keeping it costs nothing
    return bool(((labels != -100) & (attention_mask.to(labels.device) == 0)).any())


def _a_share_of_the_step(forward: Callable) -> Callable:
    """transformers' forward of a head whose loss is a mean over ``labels``, as the sum of them over
    ``num_items_in_batch`` where a caller gives that: this batch's share of a step of several."""
    place = [*inspect.signature(forward).parameters].index("labels") - 1  # without self

    @wraps(forward)
    def shared(self, *args, num_items_in_batch: int | Tensor | None = None, **kwargs):
        labels = args[place] if len(args) > place else kwargs.get("labels")
        if labels is None or num_items_in_batch is None:
            return forward(self, *args, **kwargs)
        return_dict = kwargs.pop("return_dict", None)
        output = forward(self, *args, return_dict=True, **kwargs)
        count = (labels != -100).sum().to(output.loss.device)
        # Without any label the mean is NaN, and the share nothing.
        output.loss = output.loss.masked_fill(count == 0, 0.0) * (count / num_items_in_batch)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    return shared


def _skips_logits(model: DropIn, asked: bool | None, has_labels: bool) -> bool:
    """Whether this call returns no logits: as the call says, else as the model does in training.

    Raises:
        ValueError: the call asks for it and has no labels.
    """
    if asked is None:
        return model.skip_logits and model.training and has_labels
    if asked and not has_labels:
        raise ValueError(
            f"{type(model).__name__}: expected labels with skip_logits=True, got none; without "
            "logits and without a loss there is nothing to return"
        )
    return asked


@dataclass
class LabelledOutput(MaskedLMOutput):
    """transformers' output without logits, and what they would have told.

    Attributes:
        num_correct: labelled tokens whose label no logit is above, int64.
    """

    num_correct: Tensor | None = None


@dataclass
class PreTrainingOutput(hf.BertForPreTrainingOutput):
    """The same of `BertForPreTraining`; see `LabelledOutput`."""

    num_correct: Tensor | None = None


@twin
class BertForPreTraining(DropIn, hf.BertForPreTraining):
    """``transformers.BertForPreTraining``; the masked-LM head is that of `BertForMaskedLM`."""

    _can_skip_logits = True

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
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | hf.BertForPreTrainingOutput:
        if not known.own_forward(hf.BertForPreTraining):
            return super().forward(
                input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, labels,
                next_sentence_label, **kwargs,
            )  # fmt: skip
        num_items = kwargs.pop("num_items_in_batch", None)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        labels = _by_token(labels, input_ids, inputs_embeds)
        wants_loss = labels is not None and next_sentence_label is not None
        skip = _skips_logits(self, skip_logits, wants_loss)
        chosen = _LabelledTokens.of(self, labels) if skip else None
        outputs, call = _encode_rows(self, inputs, labels, kwargs)
        rows, pooled = outputs[:2]
        if chosen is None:
            scores, relation = self.cls(rows, pooled)
        else:
            relation = self.cls.seq_relationship(pooled)
        loss = None
        if wants_loss:
            next_sentence = F.cross_entropy(relation.view(-1, 2), next_sentence_label.view(-1))
            if chosen is None:
                loss, count = _token_loss(scores, call, labels, num_items)
            else:
                loss, count = chosen.loss(rows, call, num_items), chosen.count
            if num_items is not None:  # this batch's share of the batches of a step
                next_sentence = next_sentence * (count / at_least_one(num_items))
            loss = loss + next_sentence
        output = hf.BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=None if skip else _padded(scores, call),
            seq_relationship_logits=relation,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if chosen is None else chosen.counted(PreTrainingOutput, output)


@twin
class BertForMaskedLM(DropIn, hf.BertForMaskedLM):
    """``transformers.BertForMaskedLM``; its head runs on real tokens, other logits are 0.

    With ``skip_logits=True``, given to a call with labels or for the model's training
    (`fastbert.accelerate`), it runs on labelled tokens only and ``logits`` are None.
    ``num_items_in_batch``, which `transformers.Trainer` passes, divides the loss; without a single
    label the loss is 0.
    """

    _can_skip_logits = True

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
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | MaskedLMOutput:
        if not known.own_forward(hf.BertForMaskedLM):
            return super().forward(
                input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
                encoder_hidden_states, encoder_attention_mask, labels, **kwargs,
            )  # fmt: skip
        num_items = kwargs.pop("num_items_in_batch", None)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        kwargs["encoder_hidden_states"] = encoder_hidden_states
        kwargs["encoder_attention_mask"] = encoder_attention_mask
        labels = _by_token(labels, input_ids, inputs_embeds)
        skip = _skips_logits(self, skip_logits, labels is not None)
        chosen = _LabelledTokens.of(self, labels) if skip else None
        outputs, call = _encode_rows(self, inputs, labels, kwargs)
        rows = outputs[0]
        loss = None
        if chosen is not None:
            loss = chosen.loss(rows, call, num_items)
        else:
            scores = self.cls(rows)
            if labels is not None:
                loss = _token_loss(scores, call, labels, num_items)[0]
        output = MaskedLMOutput(
            loss=loss,
            logits=None if skip else _padded(scores, call),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if chosen is None else chosen.counted(LabelledOutput, output)


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
        labels = _by_token(labels, input_ids, inputs_embeds)
        with requesting(self.bert, keep_padding=_labels_on_padding(labels, attention_mask)):
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
            output.loss = _token_loss(output.logits, None, labels, num_items)[0]
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

    forward = _a_share_of_the_step(hf.BertForSequenceClassification.forward)


@twin
class BertForMultipleChoice(DropIn, hf.BertForMultipleChoice):
    """``transformers.BertForMultipleChoice``; every choice is a sequence of its own length.

    Packed sequences (``cu_seq_lens_q``) are choices one behind the other. ``num_choices``, ``[B]``,
    is how many of them each question has; by default all are of one. Logits are ``[B, C]`` for the
    most choices of a question; what others have not is the smallest finite number.
    """

    @_a_share_of_the_step
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

    forward = _a_share_of_the_step(hf.BertForNextSentencePrediction.forward)


@twin
class BertLMHeadModel(DropIn, hf.BertLMHeadModel):
    """``transformers.BertLMHeadModel``; as a decoder it runs transformers' code."""


def _encode_rows(
    model: nn.Module,
    inputs: tuple[Tensor | None, ...],
    labels: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[BaseModelOutputWithPoolingAndCrossAttentions, Call | None]:
    """The output of ``model.bert`` with packed rows as its hidden state, and how they are packed.

    That is None, and the hidden state padded, where the base model ran transformers' code, or
    where the head or someone who watches the base model has to see padded tensors.
    """
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
    bert = model.bert
    head_takes_rows = known.row_wise(model.cls)
    if not head_takes_rows:
        say_once(f"computes padding for a head that it does not know ({type(model.cls).__name__})")
    with requesting(
        bert,
        rows=head_takes_rows and not known.user_hook(bert),
        keep_padding=not head_takes_rows or _labels_on_padding(labels, inputs[1]),
    ):
        outputs = bert(**dict(zip(names, inputs, strict=True)), return_dict=True, **kwargs)
    return outputs, getattr(outputs, "call", None)


def _token_loss(
    scores: Tensor,
    call: Call | None,
    labels: Tensor,
    num_items: int | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy over labelled tokens, from packed or padded scores, and how many there are."""
    labels = labels.to(scores.device)
    labels = labels.reshape(-1) if call is None else call.batch.pack(labels)
    count = (labels != -100).sum()
    total = F.cross_entropy(scores.view(-1, scores.shape[-1]), labels, reduction="sum")
    return total / at_least_one(count if num_items is None else num_items), count


def _padded(scores: Tensor, call: Call | None) -> Tensor:
    return scores if call is None else call.padded(scores)


class _LabelledTokens:
    """The masked-LM loss without logits: the head and the decoder see labelled tokens alone.

    Attributes:
        count: how many there are.
        decoder: the product with the vocabulary.
        correct: how many of them are right, once the loss is known.
    """

    def __init__(self, head: hf.BertLMPredictionHead, slots: Tensor, labels: Tensor):
        self.head, self.slots, self.labels = head, slots, labels
        self.count, self.decoder = labels.shape[0], head.decoder

    @classmethod
    def of(cls, model: nn.Module, labels: Tensor) -> "_LabelledTokens | None":
        """What has a label, before anything is computed; None where the whole head has to run.

        That is under a compiler, where shapes may not depend on labels, and where the head is not
        transformers' own or someone watches a part of it.

        Raises:
            ValueError: a label outside the vocabulary.
        """
        if (
            torch.compiler.is_compiling()
            or type(model.cls) not in (hf.BertOnlyMLMHead, hf.BertPreTrainingHeads)
            or not known.row_wise(model.cls)
        ):
            return None
        head = model.cls.predictions
        if (
            type(head) is not hf.BertLMPredictionHead
            or type(head.transform) is not hf.BertPredictionHeadTransform
            or not isinstance(modules.projection(head.decoder), Linear)
        ):
            return None
        device = head.decoder.weight.device
        return cls(head, *labelled_rows(labels.to(device), head.decoder.weight.shape[0]))

    def loss(self, rows: Tensor, call: Call | None, num_items: int | Tensor | None) -> Tensor:
        """From the hidden states, packed or padded."""
        at, batch = self.slots, None if call is None else call.batch
        if isinstance(batch, PackedBatch) and batch.indices is not None:
            at = torch.searchsorted(batch.indices, at)
        chosen = self._transformed(rows.reshape(-1, rows.shape[-1]).index_select(0, at))
        weight, bias = self.decoder.weight, self.decoder.bias
        total, self.correct = summed_cross_entropy(chosen, weight, bias, self.labels)
        return total / at_least_one(self.count if num_items is None else num_items)

    def counted(self, cls: type[ModelOutput], output: ModelOutput) -> ModelOutput:
        """The output with the number of tokens that are right."""
        return cls(**output, num_correct=self.correct)

    def _transformed(self, rows: Tensor) -> Tensor:
        transform = self.head.transform
        dense, norm = modules.projection(transform.dense), modules.norm(transform.LayerNorm)
        activation = modules.activation_name(transform.transform_act_fn)
        if not (
            isinstance(dense, Linear) and isinstance(norm, Norm) and isinstance(activation, str)
        ):
            return transform(rows)
        rows = ops.linear(rows, dense.weight, dense.bias, activation=activation)
        return ops.layer_norm(rows, norm.weight, norm.bias, eps=norm.eps)
