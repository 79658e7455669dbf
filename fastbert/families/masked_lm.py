"""Heads with a vocabulary as drop-in classes.

They run on real tokens, and with ``skip_logits`` on labelled ones (`_LabelledTokens`).
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils import ModelOutput

from .. import ops
from ..ops.cross_entropy import at_least_one, labelled_rows, summed_cross_entropy
from ..ops.reference import splade_ref
from ..packing import PackedBatch
from ..weights import Linear, Norm
from . import known, modules
from .drop_in import twin_of
from .family import VocabularyHead
from .heads import Head
from .in_flight import calling
from .labels import by_token, labels_on_padding, token_loss
from .model import Call, requesting
from .obstacle import say_once

__all__ = ["MaskedLMHead", "PreTrainingHead"]


def _skips_logits(model: MaskedLMHead, asked: bool | None, has_labels: bool) -> bool:
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


class MaskedLMHead(Head):
    """Its head runs on real tokens, other logits are 0.

    With ``skip_logits=True``, given to a call with labels or for the model's training
    (`fastbert.accelerate`), it runs on labelled tokens only and ``logits`` are None.
    ``num_items_in_batch``, which `transformers.Trainer` passes, divides the loss; without a single
    label the loss is 0.

    Attributes:
        vocabulary: where the head is.
    """

    further_arguments = ("skip_logits",)
    vocabulary: VocabularyHead
    _can_skip_logits = True

    def run(self, inputs: dict[str, Any]) -> ModelOutput:
        """A call, whose arguments come by name."""
        skip_logits = inputs.pop("skip_logits", None)
        if not known.own_forward(self.theirs):
            return self.call_theirs(inputs)
        num_items = inputs.pop("num_items_in_batch", None)
        labels = by_token(
            inputs.pop("labels", None), inputs.get("input_ids"), inputs.get("inputs_embeds")
        )
        skip = _skips_logits(self, skip_logits, labels is not None)
        chosen = _LabelledTokens.of(self, labels, inputs) if skip else None
        outputs, call = self.encode_rows(inputs, labels, chosen)
        rows = outputs[0]
        loss = None
        if chosen is not None:
            loss = chosen.loss(rows, call, num_items)
        else:
            scores = self.scores(rows)
            if labels is not None:
                loss = token_loss(scores, call, labels, num_items)[0]
        output = MaskedLMOutput(
            loss=loss,
            logits=None if skip else _padded(scores, call),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if chosen is None else chosen.counted(LabelledOutput, output)

    @property
    def head_modules(self) -> list[nn.Module]:
        """What is called on hidden states, one behind the other."""
        return [getattr(self, name) for name in self.vocabulary.modules]

    def scores(self, rows: Tensor) -> Tensor:
        """Logits over the vocabulary of hidden states, packed or padded."""
        for module in self.head_modules:
            rows = module(rows)
        return rows

    def encode_rows(
        self,
        inputs: dict[str, Any],
        labels: Tensor | None = None,
        chosen: _LabelledTokens | None = None,
    ) -> tuple[ModelOutput, Call | None]:
        """The output of the base model with packed rows as its hidden state, and how they are
        packed.

        That is None, and the hidden state padded, where the base model ran transformers' code, or
        where the head or someone who watches the base model has to see padded tensors.
        """
        encoder = self.base_model
        foreign = [type(m).__name__ for m in self.head_modules if not known.row_wise(m)]
        if foreign:
            say_once(f"computes padding for a head that it does not know ({foreign[0]})")
        if chosen is None:
            on_padding = labels_on_padding(labels, inputs.get("attention_mask"))
        else:
            on_padding = chosen.on_padding
        with requesting(
            encoder,
            rows=not foreign and not known.user_hook(encoder),
            keep_padding=bool(foreign) or on_padding,
        ):
            outputs = encoder(**inputs, return_dict=True)
        return outputs, getattr(outputs, "call", None)

    def splade(self, *, pooling: str = "max", activation: str = "relu", **inputs: Any) -> Tensor:
        """SPLADE's vectors of texts: how much each word of the vocabulary matters in each.

        They are those of ``log(1 + relu(logits))``, pooled over the tokens that are not padding,
        without a tensor of all logits (`fastbert.ops.linear_splade`, which describes ``pooling``
        and ``activation``). The logits are there where someone watches the model or the head is
        not transformers' own.

        Args:
            inputs: of a call, by name, without labels.

        Returns:
            ``[B, V]``, a row for each sequence.

        Raises:
            ValueError: a mask per query, which does not say what is padding.
        """
        mask = inputs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"{type(self).__name__}.splade: expected an attention_mask [batch, length], which "
                f"says what is padding, got {tuple(mask.shape)}"
            )
        with calling(self):
            decoder = _decoder(self)
            own = known.untouched(self, twin_of(self.theirs)) and not known.user_hook(self)
            if decoder is None or not own:
                logits = self(**inputs, return_dict=True).logits
                batch = _sequences(inputs, logits)
                return splade_ref(batch.pack(logits), batch.lengths, pooling, activation)
            outputs, call = self.encode_rows(inputs)
            rows = outputs[0]
            batch = None if call is None else call.batch
            if not isinstance(batch, PackedBatch):
                rows = rows if call is None else batch.view(rows)
                batch = _sequences(inputs, rows)
                rows = batch.pack(rows)
            rows = _before_decoder(self, rows)
            return ops.linear_splade(
                rows, decoder.weight, decoder.bias, batch, pooling=pooling, activation=activation
            )


class PreTrainingHead(MaskedLMHead):
    """A masked-LM head, and one that says whether the second sentence is the next one.

    Attributes:
        output, labelled: of a call; the second one also has ``num_correct``.
    """

    output: type[ModelOutput]
    labelled: type[ModelOutput]

    def run(self, inputs: dict[str, Any]) -> ModelOutput:
        """A call, whose arguments come by name."""
        skip_logits = inputs.pop("skip_logits", None)
        if not known.own_forward(self.theirs):
            return self.call_theirs(inputs)
        num_items = inputs.pop("num_items_in_batch", None)
        next_label = inputs.pop("next_sentence_label", None)
        labels = by_token(
            inputs.pop("labels", None), inputs.get("input_ids"), inputs.get("inputs_embeds")
        )
        wants_loss = labels is not None and next_label is not None
        skip = _skips_logits(self, skip_logits, wants_loss)
        chosen = _LabelledTokens.of(self, labels, inputs) if skip else None
        outputs, call = self.encode_rows(inputs, labels, chosen)
        rows, pooled = outputs[:2]
        if chosen is None:
            scores, relation = self.cls(rows, pooled)
        else:
            relation = self.cls.seq_relationship(pooled)
        loss = None
        if wants_loss:
            next_sentence = F.cross_entropy(relation.view(-1, 2), next_label.view(-1))
            if chosen is None:
                loss, count = token_loss(scores, call, labels, num_items)
            else:
                loss, count = chosen.loss(rows, call, num_items), chosen.count
            if num_items is not None:  # this batch's share of the batches of a step
                next_sentence = next_sentence * (count / at_least_one(num_items))
            loss = loss + next_sentence
        output = self.output(
            loss=loss,
            prediction_logits=None if skip else _padded(scores, call),
            seq_relationship_logits=relation,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if chosen is None else chosen.counted(self.labelled, output)


def _padded(scores: Tensor, call: Call | None) -> Tensor:
    return scores if call is None else call.padded(scores)


def _sequences(inputs: dict[str, Any], padded: Tensor) -> PackedBatch:
    """Those of a call that ``padded``, ``[B, S, ...]``, came of."""
    bounds, mask = inputs.get("cu_seq_lens_q"), inputs.get("attention_mask")
    if bounds is not None:
        return PackedBatch.from_lengths(bounds.diff().tolist(), padded.device)
    if mask is None:
        return PackedBatch.dense(*padded.shape[:2], padded.device)
    return PackedBatch.from_mask(mask, padded.device)


def _decoder(model: MaskedLMHead) -> nn.Module | None:
    """The product with the vocabulary, if what comes before it can be computed for some tokens
    alone.

    That is not so under a compiler, where shapes may not depend on data, and where the head is not
    transformers' own or someone watches a part of it.
    """
    parts = model.vocabulary
    if torch.compiler.is_compiling() or not all(
        type(attrgetter(name)(model)) is kind for name, kind in parts.owners.items()
    ):
        return None
    decoder = attrgetter(parts.decoder)(model)
    whole = all(map(known.row_wise, model.head_modules))
    return decoder if whole and isinstance(modules.projection(decoder), Linear) else None


def _before_decoder(model: MaskedLMHead, rows: Tensor) -> Tensor:
    """Hidden states ``[N, E]`` behind all of the head but its decoder."""
    parts, get = model.vocabulary, model.get_submodule
    dense, norm = modules.projection(get(parts.dense)), modules.norm(get(parts.norm))
    activation = parts.activation_name
    if parts.activation is not None:
        activation = modules.activation_name(attrgetter(parts.activation)(model))
    if isinstance(dense, Linear) and isinstance(norm, Norm) and isinstance(activation, str):
        rows = ops.linear(rows, dense.weight, dense.bias, activation=activation)
        return ops.layer_norm(rows, norm.weight, norm.bias, eps=norm.eps)
    rows = dense(rows) if callable(dense) else F.linear(rows, *dense)
    rows = ops.activate(rows, activation) if isinstance(activation, str) else activation(rows)
    return norm(rows) if callable(norm) else ops.layer_norm(rows, *norm[:2], eps=norm.eps)


class _LabelledTokens:
    """The masked-LM loss without logits: the head and the decoder see labelled tokens alone.

    Attributes:
        count: how many there are.
        on_padding: whether one is padding.
        decoder: the product with the vocabulary.
        correct: how many of them are right, once the loss is known.
    """

    def __init__(self, model: MaskedLMHead, slots: Tensor, labels: Tensor, on_padding: bool):
        self.slots, self.labels, self.count = slots, labels, labels.shape[0]
        self.on_padding = on_padding
        self.model, self.decoder = model, attrgetter(model.vocabulary.decoder)(model)

    @classmethod
    def of(
        cls, model: MaskedLMHead, labels: Tensor, inputs: dict[str, Any]
    ) -> _LabelledTokens | None:
        """What has a label, before anything is computed; None where the whole head has to run.

        Args:
            inputs: of the call.

        Raises:
            ValueError: a label outside the vocabulary.
        """
        decoder = _decoder(model)
        if decoder is None:
            return None
        weight, mask = decoder.weight, inputs.get("attention_mask")
        mask = None if mask is None or mask.shape != labels.shape else mask
        labels = labels.to(weight.device)
        return cls(model, *labelled_rows(labels, weight.shape[0], mask=mask))

    def loss(self, rows: Tensor, call: Call | None, num_items: int | Tensor | None) -> Tensor:
        """From the hidden states, packed or padded."""
        at, batch = self.slots, None if call is None else call.batch
        if isinstance(batch, PackedBatch) and batch.indices is not None:
            at = torch.searchsorted(batch.indices, at)
        chosen = _before_decoder(self.model, rows.reshape(-1, rows.shape[-1]).index_select(0, at))
        weight, bias = self.decoder.weight, self.decoder.bias
        total, self.correct = summed_cross_entropy(chosen, weight, bias, self.labels)
        return total / at_least_one(self.count if num_items is None else num_items)

    def counted(self, cls: type[ModelOutput], output: ModelOutput) -> ModelOutput:
        """The output with the number of tokens that are right."""
        return cls(**output, num_correct=self.correct)
