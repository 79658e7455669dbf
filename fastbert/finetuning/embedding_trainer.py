"""sentence-transformers' Trainer in the folder of a run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from ..tasks.loading import quiet
from ..training.batches import BatchStream
from ..training.run_folder import RunFolder
from ..training.trainer import InRun
from .embedding import Embedding
from .embedding_model import OWNERS
from .table import Table

__all__ = ["EmbeddingBatches", "EmbeddingTrainer"]

_WEIGHTS = "model.safetensors"


class _Epoch:
    """Batches that are known; see `fastbert.training.batches.EpochBatches`."""

    def __init__(self, batches: list[list[int]]):
        self._batches, self._start = batches, 0

    def resume(self, epoch: int, batches: int) -> None:
        self._start = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches[self._start :])


class EmbeddingBatches(BatchStream):
    """Batches of so many rows.

    Args:
        rows: of all batches.
        size: of a batch at most.
        distinct: no text comes twice in a batch, where it would be its own negative; several
            processes leave out batches that are not full.
        count, options: as `BatchStream`.
    """

    def __init__(
        self, rows: datasets.Dataset, size: int, count: int, *, distinct: bool, **options: int
    ):
        super().__init__(count, **options)
        self._rows, self._size, self._distinct = rows, size, distinct

    def examples(self, epoch: int) -> datasets.Dataset:
        return self._rows

    def sampler(self, examples: datasets.Dataset, epoch: int) -> _Epoch:
        if not self._distinct:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(examples), generator=generator).tolist()
            return _Epoch([order[i : i + self._size] for i in range(0, len(order), self._size)])
        sampler = NoDuplicatesBatchSampler(
            examples, self._size, drop_last=False, generator=torch.Generator(), seed=self.seed
        )
        sampler.set_epoch(epoch)
        batches = list(sampler)
        if self._world_size > 1:  # processes see each other's rows, as many of each
            batches = [batch for batch in batches if len(batch) == self._size]
        return _Epoch(batches)


class EmbeddingTrainer(InRun, SentenceTransformerTrainer):
    """Trains an accelerated `SentenceTransformer`.

    Args:
        model, args, loss, callbacks: as `SentenceTransformerTrainer`.
        task: what for.
        dataset: rows to train on; ``dev`` to choose the model by, so many at a time: ``dev_size``.
        batches, run, patience, stop: as `InRun.enter`.
    """

    greater_is_better = True

    def __init__(
        self,
        model: SentenceTransformer,
        args: TrainingArguments,
        *,
        loss: nn.Module,
        callbacks: list[TrainerCallback],
        task: Embedding,
        dataset: datasets.Dataset,
        dev: Table,
        dev_size: int,
        batches: BatchStream,
        run: RunFolder,
        patience: int | None,
        stop: Callable[[], bool],
    ):
        rows = datasets.Dataset.from_list(task.rows(dev))
        super().__init__(model, args, dataset, rows, loss, callbacks=callbacks)
        self.task, self.dev, self.best = task, dev, task.best
        self._dev_size, self._dev_loss = dev_size, task.loss(model, 1)
        self.enter(run, batches, evaluates=True, patience=patience, stop=stop)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """None: the card is the run's."""

    def tokens_of(self, inputs: dict[str, Any]) -> Tensor:
        return sum(x.sum() for name, x in inputs.items() if name.endswith("_attention_mask"))

    def count(self, inputs: dict[str, Any], outputs: Any) -> list[Tensor]:
        column = self.task.columns[0]
        owners, ids = inputs.get(f"{column}_{OWNERS}"), inputs[f"{column}_input_ids"]
        return [ids.new_tensor(len(ids)) if owners is None else owners[-1] + 1]

    def told(self, counts: list[int]) -> dict[str, float]:
        return {"rows": counts[0]}

    def measure(self, model: nn.Module) -> dict[str, float]:
        size, total = self._dev_size, 0.0
        for start in range(0, len(self.dev), size):
            rows = [self.eval_dataset[i] for i in range(start, min(start + size, len(self.dev)))]
            inputs = self._prepare_inputs(self.data_collator(rows))
            total += len(rows) * self._dev_loss(*self.collect_features(inputs)).item()
        return {"loss": total / len(self.dev), **self.task.scores(model, self.dev)}

    def save_whole(self, folder: str) -> None:
        if not self.is_world_process_zero():
            return
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model[0].model, "merge_and_unload"):
            model = copy.deepcopy(model)
            model[0].model = model[0].model.merge_and_unload()
        with quiet():
            model.save_pretrained(folder, create_model_card=False)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Of a checkpoint: the weights as they are, low-rank updates apart."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.accelerator.unwrap_model(self.model).state_dict()
        save_file({name: value.contiguous() for name, value in state.items()}, folder / _WEIGHTS)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        self.model.load_state_dict(load_file(Path(checkpoint_path) / _WEIGHTS))
