"""``fastbert finetune`` as functions: from tables to a model that is known to be good for them.

`prepare` reads everything and changes nothing; `Finetuning.report` says what the data is like and
how good it is to know nothing; `Finetuning.train` trains, or goes on with what an earlier call has
left, and says how good the best model is.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

import fastbert

from ..benchmarks.results import machine_facts
from ..tasks.durable import write_text
from ..tasks.errors import InputError, LoadError
from ..tasks.loading import load_config, load_for_training, load_tokenizer, weights_digest
from ..training.collating import PackedCollator
from ..training.run import Processes, arguments_for, train_in
from ..training.run_folder import RunFolder, writing_in
from ..training.sampling import TokenBudgetSampler
from .answering import Answering
from .kinds import task_of
from .page import page_of
from .partly import partly
from .predicting import Predictor, logits_of, said_of
from .report import DataReport, Verdict, report_on
from .sequences import Classification
from .table import Splits, Table, read_table, split_off
from .tasks import Task, tokens_of
from .trainer import FinetuningTrainer, RowBatches

__all__ = ["Finetuning", "Request", "prepare"]


@dataclass(frozen=True)
class Request:
    """What was asked for; the names are the options of the command.

    Attributes:
        train, dev, test: tables; what is not given is split off from ``train``.
        output: the folder of the run.
        model: a checkpoint of a BERT.
        task: of `kinds.TASKS`, or None for what the columns say.
        epochs: how often every row is trained on, at most.
        batch_size: rows of a step, on average: batches are counted in tokens.
        device_tokens: of one forward and backward pass.
        max_length: tokens of an example at most.
        long: what becomes of a longer row, ``"cut"`` or ``"windows"``: several examples.
        dropout: of every layer and the head; None for what the checkpoint has.
        freeze: layers that stay as they are, from the first on, and the embeddings with them.
        lora: rank of the updates to all products of the layers, which stay as they are otherwise.
        balance: rare classes weigh as much as frequent ones in the loss.
        label_smoothing: share of the target that is spread over all classes.
        dev_share, test_share: of the rows, where no file is given; no test without a share.
        patience: evaluations without gain that end the run; 0 for never.
    """

    train: str
    output: str
    model: str
    dev: str | None = None
    test: str | None = None
    task: str | None = None
    epochs: float = 3.0
    batch_size: int = 32
    device_tokens: int = 8192
    max_length: int = 128
    long: str = "cut"
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    warmup: float = 0.06
    dropout: float | None = None
    freeze: int | None = None
    lora: int | None = None
    balance: bool = False
    label_smoothing: float = 0.0
    dev_share: float = 0.1
    test_share: float = 0.0
    patience: int = 2
    evaluate_every: int | None = None
    seed: int = 0
    workers: int = 0
    device: str = "auto"
    cache_dir: str | None = None


def prepare(request: Request) -> Finetuning:
    """Read the tables and make the model.

    Raises:
        InputError: tables without what the task needs, or a setting that cannot be.
        LoadError: a model that cannot be loaded, or with a head for other labels.
    """
    processes = Processes.here(request.device, command="finetune")
    if request.long not in ("cut", "windows"):
        raise InputError(f"expected --long cut or windows, got {request.long!r}")
    tables = [
        None if path is None else read_table(path, request.cache_dir)
        for path in (request.train, request.dev, request.test)
    ]
    given = [table for table in tables if table is not None]
    task = task_of(given[0], request.task).of(*given)
    if request.balance or request.label_smoothing:
        if not isinstance(task, Classification):
            raise InputError(
                "expected --balance and --label-smoothing with classification, got them with "
                f"{task.name}"
            )
        task.weigh(given[0], balance=request.balance, smoothing=request.label_smoothing)
    for table in given:  # before rows are split off, and have other numbers
        task.check(table)
        task.gold(table)
    splits = _splits(request, *tables)
    tokenizer = load_tokenizer(request.model)
    transformers.set_seed(request.seed)
    model, new = _model(request, task)
    known = model.config.max_position_embeddings
    if request.max_length > known:
        raise InputError(
            f"expected a --max-length of at most {known}, the positions that the model knows, got "
            f"{request.max_length}"
        )
    return Finetuning(request, processes, splits, task, tokenizer, model, new)


def _splits(request: Request, train: Table, dev: Table | None, test: Table | None) -> Splits:
    if test is None and request.test_share:
        train, test = split_off(train, request.test_share, request.seed)
    if dev is None:
        train, dev = split_off(train, request.dev_share, request.seed + 1)
    return Splits(train, dev, test)


def _model(request: Request, task: Task) -> tuple[PreTrainedModel, list[str]]:
    options = dict(task.config)
    if request.dropout is not None:
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
        options |= dict.fromkeys(names, request.dropout)
    before = load_config(request.model)
    if before.architectures == [task.head] and task.config:
        has = [before.id2label[i] for i in range(before.num_labels)]
        if has != task.labels if task.labels else len(has) != 1:
            raise LoadError(
                f"expected a model for the labels {', '.join(task.labels) or 'of a regression'}, "
                f"got one for {', '.join(has)} in {request.model!r}; begin with the checkpoint "
                "that it came from"
            )
    return load_for_training(task.head, request.model, **options)


class Finetuning:
    """A run that is prepared: `report` on it, then `train`."""

    def __init__(
        self,
        request: Request,
        processes: Processes,
        splits: Splits,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        new: list[str],
    ):
        self.request, self.processes, self.splits, self.task = request, processes, splits, task
        self.tokenizer, self.new = tokenizer, new
        self.digest = weights_digest(model, without=new)
        self.model = partly(model, request.freeze, request.lora, request.seed)
        self.windows = request.long == "windows"
        self.gold = {name: task.gold(t) for name, t in self._tables().items()}
        encoded = {
            name: task.encode(table, tokenizer, request.max_length, windows=self.windows)
            for name, table in self._tables().items()
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
        self.evaluate_every = request.evaluate_every or max(
            math.ceil(self.steps / max(request.epochs, 1)), 1
        )
        self._untrained: dict[str, float] | None = None

    def _tables(self) -> dict[str, Table]:
        return {name: t for name, t in self.splits._asdict().items() if t is not None}

    def report(self) -> DataReport:
        """What the data is like, and what is reached without training."""
        return report_on(self.task, self.splits, self.lengths.tolist(), self.cut, self.untrained())

    def untrained(self) -> float:
        """The metric of the model as it is now, on dev."""
        if self._untrained is None:
            device = self.processes.device
            model = self.model.to(device).eval()
            logits = dict(logits_of(model, self.task, self.dev, device))
            predictions = map(self.task.predict, said_of(self.task, logits, self.dev))
            self._untrained = self.task.score([*predictions], self.gold["dev"])
        return self._untrained[self.task.best]

    def facts(self) -> dict[str, Any]:
        """What the run follows from, for `RunFolder.begin`."""
        asked = asdict(self.request)
        told = ("train", "dev", "test", "model")
        for name in (*told, "output", "cache_dir", "workers", "device", "task"):
            asked.pop(name)
        return {
            **asked,
            "task": self.task.name,
            "labels": self.task.labels,
            "steps": self.steps,
            **{name: table.digest() for name, table in self._tables().items()},
            "model": self.digest,
            "world_size": self.processes.count,
            **{f"_{name}": getattr(self.request, name) for name in told},
            "_machine": machine_facts(self.processes.device.type),
        }

    def train(
        self, *, allow: Iterable[str] = (), callbacks: Iterable[TrainerCallback] = ()
    ) -> Verdict:
        """Train, from the start or from the last checkpoint in the folder of the run.

        Args:
            allow: facts that may have changed since it was begun.
            callbacks: for the Trainer.

        Raises:
            InputError, OutputError, NotFinite, SystemExit: as `train_in`.
        """
        untrained = self.untrained()
        run = RunFolder(self.request.output, "finetune", is_main=self.processes.is_main)
        return train_in(
            run,
            self.processes,
            self.facts(),
            allow=allow,
            make_trainer=partial(self._trainer, [*callbacks]),
            verdict=partial(self._verdict, untrained),
            describe=self._describe,
        )

    def _trainer(
        self, callbacks: list[TrainerCallback], run: RunFolder, stop: Callable[[], bool]
    ) -> FinetuningTrainer:
        request = self.request
        args = arguments_for(
            run,
            self.processes,
            evaluate_every=self.evaluate_every,
            max_steps=self.steps,
            gradient_accumulation_steps=self.passes,
            learning_rate=request.learning_rate,
            weight_decay=request.weight_decay,
            warmup_steps=math.ceil(request.warmup * self.steps),
            seed=request.seed,
            save_steps=self.evaluate_every,
            dataloader_num_workers=request.workers,
        )
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

    def _verdict(self, untrained: float, run: RunFolder, overhead: float | None) -> Verdict:
        split = "test" if self.splits.test is not None else "dev"
        predictor = Predictor(
            run.path / "best",
            self.processes.device,
            max_length=self.request.max_length,
            windows=self.windows,
        )
        if isinstance(predictor.task, Answering):
            self._fit_threshold(predictor, run)
        table = self._tables()[split]
        predictions, described, _ = predictor(table)
        gold, metric = self.gold[split], f"eval_{self.task.best}"
        lines = run.metrics()
        found = [line for line in lines if metric in line]
        best = max(found, key=lambda line: (line[metric], -line["eval_loss"]))
        said, said_rows = self.task.baseline(self.gold["train"], gold)
        verdict = Verdict(
            split=split,
            rows=len(table),
            metric=self.task.best,
            scores=self.task.score(predictions, gold),
            baseline=(said, self.task.score(said_rows, gold)[self.task.best]),
            untrained=untrained,
            by_class=self.task.by_class(predictions, gold),
            steps=lines[-1]["step"],
            best_step=best["step"],
            overfits=_overfits(lines),
            overhead=overhead,
        )
        if self.processes.is_main:
            with writing_in(run.path):
                _write_predictions(run, self.task, described, gold)
                confusion = self.task.confusion(predictions, gold)
                page = page_of(run.path.name, self.task, self.report(), verdict, lines, confusion)
                write_text(run.path / "report.html", page)
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

    def _describe(self, folder: Path, verdict: Verdict) -> None:
        rows = "\n".join(
            f"| {what} | {html.escape(text, quote=False)} |" for what, text in self.report().lines()
        )
        more = "\n".join(verdict.lines())
        (folder / "README.md").write_text(
            f"---\nlibrary_name: transformers\npipeline_tag: {self.task.pipeline}\n---\n\n"
            f"# {Path(self.request.output).name}\n\n"
            f"A BERT, fine-tuned by `fastbert finetune` ({fastbert.__version__}) from "
            f"{Path(self.request.model).name}. This is the last model of the run; `best` beside it "
            f"is the one that was scored.\n\n| | |\n|---|---|\n{rows}\n\n{verdict}\n\n"
            f"```\n{more}\n```\n",
            "utf-8",
        )


def _overfits(lines: list[dict[str, Any]]) -> tuple[int, float, float] | None:
    """The step of the lowest loss on dev, that loss and the last one, if dev got worse behind it
    while training got better."""
    evaluated = [line for line in lines if "eval_loss" in line]
    best = min(evaluated, key=lambda line: line["eval_loss"])
    last = evaluated[-1]["eval_loss"]
    losses = [line for line in lines if "loss" in line]
    behind = [line["loss"] for line in losses if line["step"] > best["step"]]
    if len(behind) < 2 or last <= best["eval_loss"]:
        return None
    half = len(behind) // 2
    fell = np.mean(behind[half:]) < np.mean(behind[:half])
    return (best["step"], best["eval_loss"], last) if fell else None


def _write_predictions(
    run: RunFolder, task: Task, described: list[dict[str, Any]], gold: list[Any]
) -> None:
    rows = enumerate(zip(described, gold, strict=True), 1)
    lines = [{"row": row, **said, "label": task.told(right)} for row, (said, right) in rows]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(run.path / "predictions.jsonl", text)
