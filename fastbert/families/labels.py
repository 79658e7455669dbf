"""What labels and losses of heads have in common."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from ..ops.cross_entropy import at_least_one
from .model import Call

__all__ = ["by_token", "labels_on_padding", "share_of_the_step", "token_loss"]


def by_token(
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


def labels_on_padding(labels: Tensor | None, attention_mask: Tensor | None) -> bool:
    """Whether a loss over padded positions is asked for, so that their hidden states matter."""
    if labels is None or attention_mask is None or attention_mask.dim() != 2:
        return False
    if torch.compiler.is_compiling():
        return True  # padding is kept then, so keeping it costs nothing
    return bool(((labels != -100) & (attention_mask.to(labels.device) == 0)).any())


def share_of_the_step(
    output: ModelOutput, labels: Tensor | None, num_items: int | Tensor | None
) -> ModelOutput:
    """An output whose loss is a mean over ``labels``, with the sum of them over ``num_items`` where
    that is given: this batch's share of a step of several."""
    if labels is None or num_items is None:
        return output
    count = (labels != -100).sum().to(output.loss.device)
    # Without any label the mean is NaN, and the share nothing.
    output.loss = output.loss.masked_fill(count == 0, 0.0) * (count / num_items)
    return output


def token_loss(
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
