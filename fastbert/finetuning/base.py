"""What every fine-tuning has in common: how it is said what a run follows from, and how it ends."""

from __future__ import annotations

import html
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig, TrainerCallback, TrainingArguments

import fastbert

from ..benchmarks.results import machine_facts
from ..tasks.durable import write_text
from ..tasks.errors import InputError
from ..tasks.loading import max_length_of
from ..training.run import Processes, arguments_for, train_in
from ..training.run_folder import RunFolder, writing_in
from ..training.trainer import InRun
from .page import page_of
from .report import DataReport, Verdict
from .request import Request
from .table import Splits, Table

__all__ = ["Finetuning", "check_length"]


class Finetuning(ABC):
    """A run that is prepared: `report` on it, then `train`.

    Args:
        request, processes, splits: what for, by whom, on what.
        digest: of the weights that it goes on from.
        new: weights that the checkpoint does not have.

    Attributes:
        name: of the task; best: the metric that the model is chosen by; labels: that there are.
        library, pipeline: what the Hugging Face hub calls the model.
        steps: that are trained; evaluate_every: so many of them.
        cut: rows of each split that are longer than a model may see.
    """

    name: str
    best: str
    labels: list[str]
    library = "transformers"
    pipeline: str
    steps: int

    def __init__(
        self,
        request: Request,
        processes: Processes,
        splits: Splits,
        digest: str,
        new: list[str],
    ):
        self.request, self.processes, self.splits = request, processes, splits
        self.digest, self.new = digest, new
        self.cut: dict[str, int] = {}
        self._untrained: dict[str, float] | None = None

    @property
    def evaluate_every(self) -> int:
        asked = self.request.evaluate_every
        return asked or max(math.ceil(self.steps / max(self.request.epochs, 1)), 1)

    def tables(self) -> dict[str, Table]:
        """Those that there are, by name."""
        return {name: t for name, t in self.splits._asdict().items() if t is not None}

    @property
    def scored(self) -> str:
        """Which of them the verdict is about."""
        return "test" if self.splits.test is not None else "dev"

    @abstractmethod
    def report(self) -> DataReport:
        """What the data is like, and what is reached without training."""

    def untrained(self) -> float:
        """The metric of the model as it is now, on dev."""
        if self._untrained is None:
            self._untrained = self.measure_untrained()
        return self._untrained[self.best]

    @abstractmethod
    def measure_untrained(self) -> dict[str, float]:
        """Metrics of the model as it is now, on dev."""

    def facts(self) -> dict[str, Any]:
        """What the run follows from, for `RunFolder.begin`."""
        asked = asdict(self.request)
        told = ("train", "dev", "test", "model")
        for name in (*told, "output", "cache_dir", "workers", "device", "task"):
            asked.pop(name)
        return {
            **asked,
            "task": self.name,
            "labels": self.labels,
            "steps": self.steps,
            **{name: table.digest() for name, table in self.tables().items()},
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
            make_trainer=partial(self.trainer, [*callbacks]),
            verdict=partial(self.verdict, untrained),
            describe=self._describe,
        )

    @abstractmethod
    def trainer(
        self, callbacks: list[TrainerCallback], run: RunFolder, stop: Callable[[], bool]
    ) -> InRun:
        """What trains in the folder."""

    @abstractmethod
    def verdict(self, untrained: float, run: RunFolder, overhead: float | None) -> Verdict:
        """What the best model in the folder is worth; its predictions and the page are written."""

    def write_results(
        self,
        run: RunFolder,
        verdict: Verdict,
        predictions: Iterable[dict[str, Any]],
        confusion: np.ndarray | None = None,
    ) -> None:
        """The predictions of the best model, a line for each row, and the page."""
        if not self.processes.is_main:
            return
        rows = ({"row": row, **said} for row, said in enumerate(predictions, 1))
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        page = page_of(run.path.name, self.labels, self.report(), verdict, run.metrics(), confusion)
        with writing_in(run.path):
            write_text(run.path / "predictions.jsonl", text)
            write_text(run.path / "report.html", page)

    def arguments(
        self, run: RunFolder, kind: type[TrainingArguments] = TrainingArguments, **options: Any
    ) -> TrainingArguments:
        """Of the Trainer, as far as the request says them."""
        request = self.request
        return arguments_for(
            run,
            self.processes,
            evaluate_every=self.evaluate_every,
            kind=kind,
            max_steps=self.steps,
            learning_rate=request.learning_rate,
            weight_decay=request.weight_decay,
            warmup_steps=math.ceil(request.warmup * self.steps),
            seed=request.seed,
            save_steps=self.evaluate_every,
            dataloader_num_workers=request.workers,
            **options,
        )

    def verdict_of(
        self,
        run: RunFolder,
        scores: dict[str, float],
        baseline: tuple[str, float],
        untrained: float,
        overhead: float | None,
        by_class: list[dict[str, Any]],
    ) -> Verdict:
        """With what the metrics of the run say."""
        lines, metric = run.metrics(), f"eval_{self.best}"
        found = [line for line in lines if metric in line]
        best = max(found, key=lambda line: (line[metric], -line["eval_loss"]))
        return Verdict(
            split=self.scored,
            rows=len(self.tables()[self.scored]),
            metric=self.best,
            scores=scores,
            baseline=baseline,
            untrained=untrained,
            by_class=by_class,
            steps=lines[-1]["step"],
            best_step=best["step"],
            overfits=_overfits(lines),
            overhead=overhead,
        )

    def _describe(self, folder: Path, verdict: Verdict) -> None:
        rows = "\n".join(
            f"| {what} | {html.escape(text, quote=False)} |" for what, text in self.report().lines()
        )
        more = "\n".join(verdict.lines())
        longer = ""
        if self.request.long == "windows":
            longer = (
                f" Longer texts were read in windows of {self.request.max_length} tokens; pass "
                "`--long windows` to have them read so again."
            )
        (folder / "README.md").write_text(
            f"---\nlibrary_name: {self.library}\npipeline_tag: {self.pipeline}\n---\n\n"
            f"# {Path(self.request.output).name}\n\n"
            f"A BERT, fine-tuned by `fastbert finetune` ({fastbert.__version__}) from "
            f"{Path(self.request.model).name}. This is the last model of the run; `best` beside it "
            f"is the one that was scored.{longer}\n\n| | |\n|---|---|\n{rows}\n\n{verdict}\n\n"
            f"```\n{more}\n```\n",
            "utf-8",
        )


def check_length(request: Request, config: PreTrainedConfig) -> None:
    """Whether the model knows as many positions as are asked for.

    Raises:
        InputError: it knows fewer.
    """
    known = max_length_of(config)
    if request.max_length > known:
        raise InputError(
            f"expected a --max-length of at most {known}, the positions that the model knows, got "
            f"{request.max_length}"
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
