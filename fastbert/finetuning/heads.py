"""Fine-tuning of a model with a head for a task."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
from transformers import PreTrainedModel, TrainerCallback

from ..tasks.durable import write_text
from ..tasks.errors import InputError, LoadError
from ..tasks.loading import load_config, load_for_training, load_tokenizer, weights_digest
from ..training.collating import PackedCollator
from ..training.run import Processes
from ..training.run_folder import RunFolder, writing_in
from ..training.sampling import TokenBudgetSampler
from .answering import Answering
from .base import Finetuning, check_length
from .partly import partly
from .predicting import Predictor, logits_of, said_of
from .report import DataReport, Verdict, report_on
from .request import Request
from .sequences import Classification
from .table import Splits
from .tasks import Task, tokens_of
from .trainer import FinetuningTrainer, RowBatches

__all__ = ["HeadFinetuning"]


class HeadFinetuning(Finetuning):
    """A model with the head of a task, on packed batches.

    Args:
        request, processes, splits: as `Finetuning`.
        task: what for.

    Raises:
        InputError: a setting that cannot be.
        LoadError: a model that cannot be loaded, or with a head for other labels.
    """

    def __init__(self, request: Request, processes: Processes, splits: Splits, task: Task):
        if request.balance or request.label_smoothing:
            if not isinstance(task, Classification):
                raise InputError(
                    "expected --balance and --label-smoothing with classification, got them with "
                    f"{task.name}"
                )
            task.weigh(splits.train, balance=request.balance, smoothing=request.label_smoothing)
        tokenizer = load_tokenizer(request.model)
        model, new = _model(request, task)
        task.check_model(model)
        check_length(request, model.config)
        super().__init__(request, processes, splits, weights_digest(model, without=new), new)
        self.task, self.tokenizer = task, tokenizer
        self.name, self.best, self.labels = task.name, task.best, task.labels
        self.pipeline = task.pipeline
        self.model = partly(model, request.freeze, request.lora, request.seed)
        self.windows = request.long == "windows"
        self.gold = {name: task.gold(t) for name, t in self.tables().items()}
        encoded = {
            name: task.encode(table, tokenizer, request.max_length, windows=self.windows)
            for name, table in self.tables().items()
        }
        self.cut = {name: 0 if self.windows else cut for name, (_, cut) in encoded.items()}
        self.dev = encoded["dev"][0]
        self.data = task.with_labels(encoded["train"][0], self.gold["train"])
        self.lengths = np.array([*map(tokens_of, self.data)])
        # So many rows on average; a longest one has to fit.
        wanted = max(round(request.batch_size * self.lengths.mean()), self.lengths.max())
        shared = request.device_tokens * processes.count
        self.passes = max(math.ceil(wanted / shared), 1)
        self.pass_tokens = max(
            math.ceil(wanted / (self.passes * processes.count)), int(self.lengths.max())
        )
        batches = sum(
            len(TokenBudgetSampler(self.lengths, self.pass_tokens, seed=request.seed, epoch=epoch,
                                   rank=0, world_size=1))
            for epoch in range(math.ceil(request.epochs))
        )  # fmt: skip
        whole = math.ceil(request.epochs) / request.epochs
        self.steps = max(math.ceil(batches / whole / (self.passes * processes.count)), 1)

    def report(self) -> DataReport:
        task, gold = self.task, self.gold
        said, predictions = task.baseline(gold["train"], gold["dev"])
        return report_on(
            self.splits,
            task=task.name,
            metric=task.best,
            labels={name: self._counts(name) for name in gold},
            lengths=self.lengths.tolist(),
            cut=self.cut,
            baseline=(said, task.score(predictions, gold["dev"])[task.best]),
            untrained=self.untrained(),
            remarks={name: task.remarks(table) for name, table in self.tables().items()},
        )

    def _counts(self, name: str) -> Counter[str]:
        found: Counter[str] = Counter()
        if self.labels:
            for told in map(self.task.told, self.gold[name]):
                found.update(told if isinstance(told, list) else [told])
        return found

    def measure_untrained(self) -> dict[str, float]:
        device = self.processes.device
        model = self.model.to(device).eval()
        logits = dict(logits_of(model, self.task, self.dev, device))
        predictions = map(self.task.predict, said_of(self.task, logits, self.dev))
        return self.task.score([*predictions], self.gold["dev"])

    def trainer(
        self, callbacks: list[TrainerCallback], run: RunFolder, stop: Callable[[], bool]
    ) -> FinetuningTrainer:
        request = self.request
        args = self.arguments(run, gradient_accumulation_steps=self.passes)
        share = {"rank": args.process_index, "world_size": args.world_size}
        count = self.steps * self.passes
        return FinetuningTrainer(
            self.model,
            args,
            dataset=self.data,
            data_collator=PackedCollator(self.model, labels=self.task.labels_of),
            batches=RowBatches(self.lengths, self.pass_tokens, count, seed=request.seed, **share),
            task=self.task,
            dev=self.dev,
            gold=self.gold["dev"],
            run=run,
            patience=request.patience or None,
            stop=stop,
            processing_class=self.tokenizer,
            callbacks=callbacks,
        )

    def verdict(self, untrained: float, run: RunFolder, overhead: float | None) -> Verdict:
        predictor = Predictor(
            run.path / "best",
            self.processes.device,
            max_length=self.request.max_length,
            windows=self.windows,
        )
        if isinstance(predictor.task, Answering):
            self._fit_threshold(predictor, run)
        task, gold = self.task, self.gold[self.scored]
        predictions, described, _ = predictor(self.tables()[self.scored])
        said, said_rows = task.baseline(self.gold["train"], gold)
        verdict = self.verdict_of(
            run,
            scores=task.score(predictions, gold),
            baseline=(said, task.score(said_rows, gold)[task.best]),
            untrained=untrained,
            overhead=overhead,
            by_class=task.by_class(predictions, gold),
        )
        rows = zip(described, gold, strict=True)
        lines = ({**said, "label": task.told(right)} for said, right in rows)
        self.write_results(run, verdict, lines, task.confusion(predictions, gold))
        return verdict

    def _fit_threshold(self, predictor: Predictor, run: RunFolder) -> None:
        """By dev, and for good: into the configuration of the best model."""
        predictor.task.fit(predictor.said(self.splits.dev)[0], self.gold["dev"])
        if self.processes.is_main:
            path = run.path / "best" / "config.json"
            config = json.loads(path.read_text("utf-8"))
            config["no_answer_threshold"] = predictor.task.threshold
            with writing_in(run.path):
                write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _model(request: Request, task: Task) -> tuple[PreTrainedModel, list[str]]:
    options = dict(task.config)
    before = load_config(request.model)
    if request.dropout is not None:
        names = [name for name in before.to_dict() if "dropout" in name]
        options |= dict.fromkeys(names, request.dropout)
    if (before.architectures or [""])[0].endswith(task.head) and task.config:
        has = [before.id2label[i] for i in range(before.num_labels)]
        if has != task.labels if task.labels else len(has) != 1:
            raise LoadError(
                f"expected a model for the labels {', '.join(task.labels) or 'of a regression'}, "
                f"got one for {', '.join(has)} in {request.model!r}; begin with the checkpoint "
                "that it came from"
            )
    return load_for_training(task.head, request.model, **options)
