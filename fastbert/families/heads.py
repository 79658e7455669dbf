"""Heads as drop-in classes, but for those with a vocabulary (`masked_lm`).

What stands here are kinds of heads, each for every family. Where transformers' forward does the
right thing with padded hidden states it is called, with an encoder that knows what is wanted.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
)
from transformers.utils import ModelOutput

from ..ops.cross_entropy import at_least_one
from . import known
from .drop_in import DropIn
from .labels import by_token, labels_on_padding, share_of_the_step, token_loss
from .model import requesting

__all__ = [
    "Head",
    "MultipleChoiceHead",
    "QuestionAnsweringHead",
    "SequenceHead",
    "TokenHead",
    "packed_span_loss",
]


class Head(DropIn):
    """It runs transformers' code on what a packed encoder gives."""

    def call_theirs(self, inputs: dict[str, Any]) -> ModelOutput:
        """transformers' forward."""
        return self.theirs.forward(self, **inputs, return_dict=True)

    def run(self, inputs: dict[str, Any]) -> ModelOutput:
        """A call, whose arguments come by name."""
        return self.call_theirs(inputs)


class SequenceHead(Head):
    """Its loss is a mean over sequences; ``num_items_in_batch``, the labels of a step of several
    batches, makes it this batch's share of the step.

    Attributes:
        first: classes of the parts, by name, that read the first token of a sequence alone; None
            where hidden states are not read, or all of them.
        keep_padding: whether those of padding may be read.
    """

    first: dict[str, type[nn.Module]] | None = None
    keep_padding = False

    def run(self, inputs: dict[str, Any]) -> ModelOutput:
        """A call, whose arguments come by name."""
        num_items = inputs.pop("num_items_in_batch", None)
        encoder = self.base_model
        first = self._reads_first() and not known.user_hook(encoder)
        bounds = inputs.get("cu_seq_lens_q")
        if self.first is not None and not first and bounds is not None and bounds.numel() > 2:
            raise ValueError(
                f"{type(self).__name__}: expected transformers' own head for packed sequences, got "
                "one that was replaced or that a hook watches, which would read the first of them "
                "alone; pass a padded batch"
            )
        with requesting(encoder, first=first, keep_padding=self.keep_padding, bounds=bounds):
            output = self.call_theirs(inputs)
        return share_of_the_step(output, inputs.get("labels"), num_items)

    def _reads_first(self) -> bool:
        """Whether the first row of each sequence is all that is read of hidden states."""
        if self.first is None or not known.own_forward(self.theirs):
            return False
        return all(_is_plain(getattr(self, name), cls) for name, cls in self.first.items())


def _is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a part is transformers' own and nobody watches it; or PEFT's choice of such ones."""
    copies = known.copies(module)
    if copies is not None:
        return all(_is_plain(copy, cls) for copy in copies)
    return known.untouched(module, cls) and not known.watched(module)


class TokenHead(Head):
    """A label for each token; labels may lie on padding, which is computed then."""

    def run(self, inputs: dict[str, Any]) -> ModelOutput:
        """A call, whose arguments come by name."""
        num_items = inputs.pop("num_items_in_batch", None)
        labels = by_token(
            inputs.get("labels"), inputs.get("input_ids"), inputs.get("inputs_embeds")
        )
        keep = labels_on_padding(labels, inputs.get("attention_mask"))
        bounds = inputs.get("cu_seq_lens_q")
        with requesting(self.base_model, keep_padding=keep, bounds=bounds):
            output = self.call_theirs({**inputs, "labels": labels})
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
            f"expected a start and an end for each of {len(lengths)} packed sequences, got "
            f"{labels.shape[0]}"
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


class QuestionAnsweringHead(Head):
    """Without labels, padding cannot be an answer.

    Start and end are chosen among all positions, so the logits of padding matter. Without labels
    they are the smallest finite number. With labels, transformers' loss has them in its softmax,
    so such a batch is computed with its padding. Of packed sequences (``cu_seq_lens_q``) each has a
    softmax of its own; labels are ``[B]``, places in the sequence.
    """

    def run(self, inputs: dict[str, Any]) -> ModelOutput:
        """A call, whose arguments come by name."""
        places = (inputs.get("start_positions"), inputs.get("end_positions"))
        with_labels = all(place is not None for place in places)
        bounds, labels = inputs.get("cu_seq_lens_q"), None
        if with_labels and bounds is not None:
            labels = torch.stack([place.flatten() for place in places], 1)
            inputs |= {"start_positions": None, "end_positions": None}
        keep = with_labels and labels is None
        with requesting(self.base_model, keep_padding=keep, bounds=bounds):
            output = self.call_theirs(inputs)
        if labels is not None:
            num_items = inputs.get("num_items_in_batch")
            output.loss = packed_span_loss(output, labels, bounds, num_items)
        mask = inputs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and not with_labels and self.padding == "zeros":
            padding = mask.to(output.start_logits.device) == 0
            lowest = torch.finfo(output.start_logits.dtype).min
            output.start_logits = output.start_logits.masked_fill(padding, lowest)
            output.end_logits = output.end_logits.masked_fill(padding, lowest)
        return output


class MultipleChoiceHead(SequenceHead):
    """Every choice is a sequence of its own length.

    Packed sequences (``cu_seq_lens_q``) are choices one behind the other. ``num_choices``, ``[B]``,
    is how many of them each question has; by default all are of one. Logits are ``[B, C]`` for the
    most choices of a question; what others have not is the smallest finite number.
    """

    further_arguments = ("num_choices",)

    def run(self, inputs: dict[str, Any]) -> ModelOutput:
        """A call, whose arguments come by name."""
        num_choices = inputs.pop("num_choices", None)
        if inputs.get("cu_seq_lens_q") is None:
            if num_choices is not None:
                raise ValueError(
                    f"{type(self).__name__}: expected num_choices with packed sequences alone, got "
                    "it without cu_seq_lens_q; a padded batch [B, C, S] says itself how many"
                )
            return super().run(inputs)
        if getattr(self.base_model, "pooler", None) is None:
            raise ValueError(
                f"{type(self).__name__}: expected choices as a padded batch [B, C, S], got packed "
                "sequences (cu_seq_lens_q), which are for heads behind a pooler"
            )
        labels = inputs.pop("labels", None)
        num_items = inputs.pop("num_items_in_batch", None)
        outputs = self.base_model(**inputs, return_dict=True)
        logits = self.classifier(self.dropout(outputs.pooler_output)).flatten()
        counts = [len(logits)] if num_choices is None else num_choices.tolist()
        if sum(counts) != len(logits) or min(counts) < 1:
            raise ValueError(
                f"{type(self).__name__}: expected num_choices to share out the {len(logits)} "
                f"packed sequences, got {counts}"
            )
        lowest = torch.finfo(logits.dtype).min
        logits = nn.utils.rnn.pad_sequence(logits.split(counts), True, lowest)
        output = MultipleChoiceModelOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return share_of_the_step(output, labels, num_items)
