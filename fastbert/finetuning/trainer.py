"""Fine-tuning with transformers' Trainer: the rows of a table in a new order in every epoch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..training.batches import BatchStream
from ..training.trainer import RunTrainer
from .predicting import logits_of
from .tasks import Example, Task

__all__ = ["FinetuningTrainer", "RowBatches"]

_IGNORED = -100


class _Rows(NamedTuple):
    lengths: np.ndarray


class RowBatches(BatchStream):
    """Batches of the same examples in every epoch.

    Args:
        lengths: of the examples.
        tokens, count, options: as `BatchStream`.
    """

    def __init__(self, lengths: np.ndarray, tokens: int, count: int, **options: int):
        super().__init__(tokens, count, **options)
        self._rows = _Rows(lengths)

    def examples(self, epoch: int) -> _Rows:
        return self._rows

    def keys(self, examples: _Rows, epoch: int, batch: list[int], over: float) -> list[int]:
        return batch


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
        super().__init__(*args, evaluates=True, **options)
        self.task, self.dev, self.gold, self.best = task, dev, gold, task.best

    def count(self, inputs: dict[str, Any], outputs: Any) -> list[Tensor]:
        labels, logits = inputs["labels"], outputs["logits"]
        has = labels != _IGNORED
        if labels.is_floating_point():  # of numbers, or of several labels
            return [has.sum()]
        return [has.sum(), ((logits.argmax(-1) == labels) & has).sum()]

    def told(self, counts: list[int]) -> dict[str, float]:
        labelled, *right = counts
        told = {"labels": labelled}
        return told | ({"accuracy": right[0] / max(labelled, 1)} if right else {})

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Loss and metrics on the rows of dev, of all processes."""
        found = []
        share = {"rank": self.args.process_index, "world_size": self.args.world_size}
        for i, logits in logits_of(model, self.task, self.dev, self.args.device, **share):
            losses = self.task.losses(logits, self.dev[i], self.gold[i])
            found.append((i, (self.task.predict(logits, self.dev[i]), losses)))
        said = dict(gather_object(found))
        predictions, losses = zip(*(said[i] for i in range(len(self.dev))), strict=True)
        loss = float(np.concatenate(losses).mean())
        return {"loss": loss, **self.task.score([*predictions], self.gold)}
