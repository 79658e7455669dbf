"""Fine-tuning with transformers' Trainer: the rows of a table in a new order in every epoch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..training.batches import TokenBatches
from ..training.trainer import RunTrainer
from .partly import save_merged
from .predicting import logits_of, said_of
from .tasks import Example, Task

__all__ = ["FinetuningTrainer", "RowBatches"]

_IGNORED = -100


class _Rows(NamedTuple):
    lengths: np.ndarray


class RowBatches(TokenBatches):
    """Batches of the same examples in every epoch.

    Args:
        lengths: of the examples.
        tokens, count, options: as `TokenBatches`.
    """

    def __init__(self, lengths: np.ndarray, tokens: int, count: int, **options: int):
        super().__init__(tokens, count, **options)
        self._rows = _Rows(lengths)

    def examples(self, epoch: int) -> _Rows:
        return self._rows


class FinetuningTrainer(RunTrainer):
    """Trains a model with the head of a task.

    Args:
        task: what for.
        dev: examples to choose the model by, without labels; ``gold`` is right for them.
        options: as `RunTrainer`.
    """

    greater_is_better = True

    def __init__(
        self,
        *args: Any,
        task: Task,
        dev: list[Example],
        gold: list[Any],
        **options: Any,
    ):
        own = self._loss if task.has_own_loss else None
        super().__init__(*args, evaluates=True, compute_loss_func=own, **options)
        self.task, self.dev, self.gold, self.best = task, dev, gold, task.best

    def compute_loss(self, model, inputs, *args, **kwargs):
        self._bounds = inputs["cu_seq_lens_q"]
        return super().compute_loss(model, inputs, *args, **kwargs)

    def save_whole(self, folder: str) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if not hasattr(model, "merge_and_unload"):
            super().save_whole(folder)
        elif self.is_world_process_zero():
            save_merged(model, folder)
            self.processing_class.save_pretrained(folder)

    def _loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        count = labels.numel() if num_items_in_batch is None else num_items_in_batch
        return self.task.loss(outputs, labels, self._bounds) / count

    def count(self, inputs: dict[str, Any], outputs: Any) -> list[Tensor]:
        labels = inputs["labels"]
        has = labels != _IGNORED
        if labels.is_floating_point() or "logits" not in outputs:
            return [has.sum()]
        return [has.sum(), ((outputs["logits"].argmax(-1) == labels) & has).sum()]

    def told(self, counts: list[int]) -> dict[str, float]:
        labelled, *right = counts
        told = {"labels": labelled}
        return told | ({"accuracy": right[0] / max(labelled, 1)} if right else {})

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Loss and metrics on the rows of dev, of all processes."""
        share = {"rank": self.args.process_index, "world_size": self.args.world_size}
        mine = [*logits_of(model, self.task, self.dev, self.args.device, **share)]
        said = said_of(self.task, dict(gather_object(mine)), self.dev)
        losses = [self.task.losses(*pair) for pair in zip(said, self.gold, strict=True)]
        predictions = [*map(self.task.predict, said)]
        return {
            "loss": float(np.concatenate(losses).mean()),
            **self.task.score(predictions, self.gold),
        }
