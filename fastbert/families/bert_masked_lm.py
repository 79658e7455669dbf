"""BERT's masked-LM heads as drop-in classes.

They run on real tokens, and with ``skip_logits`` on labelled ones (`_LabelledTokens`).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    MaskedLMOutput,
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
from .bert_labels import by_token, labels_on_padding, token_loss
from .bert_obstacle import say_once
from .drop_in import DropIn, twin

__all__ = ["BertForMaskedLM", "BertForPreTraining"]


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
        labels = by_token(labels, input_ids, inputs_embeds)
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
                loss, count = token_loss(scores, call, labels, num_items)
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
        labels = by_token(labels, input_ids, inputs_embeds)
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
                loss = token_loss(scores, call, labels, num_items)[0]
        output = MaskedLMOutput(
            loss=loss,
            logits=None if skip else _padded(scores, call),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if chosen is None else chosen.counted(LabelledOutput, output)


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
        keep_padding=not head_takes_rows or labels_on_padding(labels, inputs[1]),
    ):
        outputs = bert(**dict(zip(names, inputs, strict=True)), return_dict=True, **kwargs)
    return outputs, getattr(outputs, "call", None)


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
