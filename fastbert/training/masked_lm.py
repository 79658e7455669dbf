"""Pre-training with transformers' Trainer: masked tokens, and next sentences or none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import TokenBatches
from .masking import IGNORED
from .segments import Drawn, Segments
from .trainer import RunTrainer

__all__ = ["DrawnBatches", "PretrainingTrainer"]


class DrawnBatches(TokenBatches):
    """Batches of segments that are drawn anew for every epoch.

    Args:
        draw: the examples of an epoch.
        probability: share of the tokens to be masked, by the share of the run that is over.
        tokens, count, options: as `TokenBatches`.
    """

    def __init__(
        self,
        draw: Callable[[int], Segments],
        tokens: int,
        count: int,
        *,
        probability: Callable[[float], float] = lambda share: 0.15,
        **options: int,
    ):
        super().__init__(tokens, count, **options)
        self._draw, self._probability = draw, probability

    def examples(self, epoch: int) -> Segments:
        return self._draw(epoch)

    def keys(self, examples: Segments, epoch: int, batch: list[int], over: float) -> list[Drawn]:
        probability = self._probability(over)
        return [
            Drawn(
                epoch,
                index,
                tuple(examples.a[index].tolist()),
                tuple(examples.b[index].tolist()),
                int(examples.random[index]),
                probability,
            )
            for index in batch
        ]


class PretrainingTrainer(RunTrainer):
    """Trains a `fastbert.BertForPreTraining` or `fastbert.BertForMaskedLM` on drawn segments, by
    what `fastbert.training.SegmentDataset` and a `PackedCollator` with a masking make of them.

    Args:
        held_out: batches of an evaluation, or None.
        options: as `RunTrainer`.
    """

    def __init__(self, *args: Any, held_out: TokenBatches | None, **options: Any):
        super().__init__(*args, evaluates=held_out is not None, **options)
        self.held_out = held_out

    def count(self, inputs: dict[str, Any], outputs: Any) -> list[Tensor]:
        counts = [(inputs["labels"] != IGNORED).sum(), outputs["num_correct"]]
        relation = outputs.get("seq_relationship_logits")
        if relation is not None:
            right = relation.argmax(-1) == inputs["next_sentence_label"]
            counts += [right.sum(), right.new_tensor(len(right), dtype=torch.int64)]
        return counts

    def told(self, counts: list[int]) -> dict[str, float]:
        masked, right, *pairs = counts
        told = {"masked": masked, "mlm_accuracy": right / max(masked, 1)}
        return told | ({"nsp_accuracy": pairs[0] / pairs[1]} if pairs else {})

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Loss, accuracy and perplexity on the documents that are held out."""
        sums = torch.zeros(6, dtype=torch.float64, device=self.args.device)
        for inputs in self.loader(self.held_out):
            sums += _scores(model, self._prepare_inputs(inputs)).to(sums)
        mlm, right, count, nsp, nsp_right, pairs = self.accelerator.reduce(sums).tolist()
        found = {
            "loss": mlm / count + nsp / max(pairs, 1),
            "mlm_loss": mlm / count,
            "perplexity": math.exp(min(mlm / count, 700)),
            "mlm_accuracy": right / count,
        }
        if pairs:
            found |= {"nsp_loss": nsp / pairs, "nsp_accuracy": nsp_right / pairs}
        return found


def _scores(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Of a batch: summed masked-LM loss, right and all masked tokens; the same of its pairs."""
    outputs = model(**inputs, skip_logits=True)
    masked = (inputs["labels"] != IGNORED).sum()
    relation, pairs = outputs.get("seq_relationship_logits"), torch.zeros(3, device=masked.device)
    loss = outputs.loss.double()
    if relation is not None:
        relation, labels = relation.float(), inputs["next_sentence_label"]
        right = (relation.argmax(-1) == labels).sum()
        pairs = torch.stack([F.cross_entropy(relation, labels, reduction="sum"), right,
                             right.new_tensor(len(labels))])  # fmt: skip
        loss = loss - pairs[0] / len(labels)
    return torch.cat([torch.stack([loss * masked, outputs.num_correct, masked]), pairs.double()])
