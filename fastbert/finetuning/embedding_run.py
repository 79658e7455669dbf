"""Fine-tuning of sentence embeddings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import datasets
import numpy as np
from sentence_transformers import SentenceTransformerTrainingArguments
from torch import nn
from transformers import TrainerCallback

from ..tasks.errors import InputError
from ..tasks.loading import weights_digest
from ..tasks.windows import Windows, encode_rows
from ..training.run import Processes
from ..training.run_folder import RunFolder
from .base import Finetuning, check_length
from .embedding import Embedding
from .embedding_model import load_embedding_model
from .embedding_trainer import EmbeddingBatches, EmbeddingTrainer
from .partly import partly
from .report import DataReport, Verdict, report_on
from .request import Request
from .table import Splits, Table

__all__ = ["EmbeddingFinetuning"]

_WORDS_ALONE = "words alone (TF-IDF)"


class EmbeddingFinetuning(Finetuning):
    """A model of sentence-transformers, on its Trainer.

    Args:
        request, processes, splits: as `Finetuning`.
        task: what for.

    Raises:
        InputError: a setting that cannot be.
        LoadError: a model that cannot be loaded.
    """

    library, pipeline = "sentence-transformers", "sentence-similarity"

    def __init__(self, request: Request, processes: Processes, splits: Splits, task: Embedding):
        for asked, name in (
            (request.balance, "--balance"),
            (request.label_smoothing, "--label-smoothing"),
        ):
            if asked:
                raise InputError(f"expected no {name} with embeddings, got it")
        self._reading = {
            "max_length": request.max_length,
            "windows": request.long == "windows",
            "pass_tokens": request.device_tokens,
        }
        model = load_embedding_model(request.model, processes.device, frozen=False, **self._reading)
        encoder = model.transformers_model
        check_length(request, encoder.config)
        digest = weights_digest(model)
        new = [] if model.module_kwargs else ["mean pooling"]
        super().__init__(request, processes, splits, digest, new)
        self.task, self.name, self.best, self.labels = task, task.name, task.best, []
        _set_dropout(model, request.dropout)
        if getattr(encoder, "pooler", None) is not None and "pooler_output" not in str(
            model[0].modality_config
        ):
            encoder.pooler.requires_grad_(False)  # nothing comes of it
        model[0].model = partly(encoder, request.freeze, request.lora, request.seed)
        self.model = model
        self.data = datasets.Dataset.from_list(task.rows(splits.train))
        found = {name: self._lengths(table) for name, table in self.tables().items()}
        self.cut = {
            name: 0 if model.windows else int((lengths > request.max_length).any(1).sum())
            for name, lengths in found.items()
        }
        seen = found["train"] if model.windows else np.minimum(found["train"], request.max_length)
        self.lengths = seen.sum(1)
        self.size = math.ceil(request.batch_size / processes.count)
        stream = self._batches(0, world_size=processes.count)
        epochs = range(math.ceil(request.epochs))
        batches = sum(len(stream.sampler(self.data, epoch)) for epoch in epochs)
        if not batches:
            raise InputError(
                f"expected rows for a batch of {self.size} on every process, got "
                f"{len(self.data)} in all; lower --batch-size"
            )
        share = request.epochs / len(epochs)
        self.steps = max(math.ceil(batches * share / processes.count), 1)

    def _batches(self, count: int, **share: int) -> EmbeddingBatches:
        options = {"distinct": self.task.distinct, "seed": self.request.seed, **share}
        return EmbeddingBatches(self.data, self.size, count, **options)

    def _lengths(self, table: Table) -> np.ndarray:
        """Tokens of every text, ``[rows, columns]``, before any is cut, or in windows."""
        model, prompts, columns = self.model, self.task.prompts(self.model), []
        for name in self.task.columns:
            prompt = prompts.get(name)
            rows, _ = encode_rows(model, table.column(name), prompt, whole=True)
            lengths = [len(row["input_ids"]) for row in rows]
            windows = Windows(model, prompt) if model.windows else None
            columns.append([windows.tokens(n) for n in lengths] if windows else lengths)
        return np.array(columns).T

    def report(self) -> DataReport:
        return report_on(
            self.splits,
            task=self.name,
            metric=self.best,
            labels={name: Counter() for name in self.tables()},
            lengths=self.lengths.tolist(),
            cut=self.cut,
            baseline=(_WORDS_ALONE, self.task.words_alone(self.splits.dev)),
            untrained=self.untrained(),
            remarks={},
        )

    def measure_untrained(self) -> dict[str, float]:
        return self.task.scores(self.model, self.splits.dev)

    def trainer(
        self, callbacks: list[TrainerCallback], run: RunFolder, stop: Callable[[], bool]
    ) -> EmbeddingTrainer:
        args = self.arguments(
            run,
            SentenceTransformerTrainingArguments,
            per_device_train_batch_size=self.size,
            prompts=self.task.prompts(self.model) or None,
        )
        share = {"rank": args.process_index, "world_size": args.world_size}
        return EmbeddingTrainer(
            self.model.train(),
            args,
            loss=self.task.loss(self.model, self.processes.count),
            callbacks=callbacks,
            task=self.task,
            dataset=self.data,
            dev=self.splits.dev,
            dev_size=self.request.batch_size,
            batches=self._batches(self.steps, **share),
            run=run,
            patience=self.request.patience or None,
            stop=stop,
        )

    def verdict(self, untrained: float, run: RunFolder, overhead: float | None) -> Verdict:
        best = load_embedding_model(run.path / "best", self.processes.device, **self._reading)
        table = self.tables()[self.scored]
        verdict = self.verdict_of(
            run,
            scores=self.task.scores(best, table),
            baseline=(_WORDS_ALONE, self.task.words_alone(table)),
            untrained=untrained,
            overhead=overhead,
            by_class=[],
        )
        self.write_results(run, verdict, self.task.predictions(best, table))
        return verdict


def _set_dropout(model: nn.Module, share: float | None) -> None:
    if share is None:
        return
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
    config = model.transformers_model.config
    for name in config.to_dict():
        if "dropout" in name:
            setattr(config, name, share)
