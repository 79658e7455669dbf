"""``fastbert pretrain`` as functions: a run of what was asked for, planned and trained.

`prepare` reads everything and changes nothing but caches and the tokenizer that it may train;
`Pretraining.plan` says what will happen and how long it takes; `Pretraining.train` does it, or goes
on with what an earlier call has left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

import fastbert

from ..benchmarks.results import machine_facts
from ..tasks.errors import InputError
from ..tasks.loading import weights_digest
from .beginning import model_for, tokenizer_for
from .collating import PackedCollator
from .corpus import Corpus, files_of
from .cost import Cost, try_out
from .masked_lm import DrawnBatches, PretrainingTrainer
from .masking import Masking
from .request import Plan, Request, Verdict, mask_schedule
from .run import Processes, arguments_for, train_in
from .run_folder import RunFolder
from .sampling import TokenBudgetSampler
from .segments import SegmentDataset, Segments, draw

__all__ = ["Pretraining", "prepare"]

_HELD_OUT_TOKENS = 100_000  # of an evaluation at most, about
_PROBE_BATCHES = 20
_WARMUP = 0.06  # share of the steps


def prepare(request: Request) -> Pretraining:
    """Read the texts and make the model. Of the folder of the run only the tokenizer is written,
    where one is trained.

    Raises:
        InputError: texts, a length or a length of the run that cannot be.
        LoadError: a model or a tokenizer that cannot be loaded, or do not go together.
    """
    if sum(x is not None for x in (request.tokens, request.steps, request.hours)) != 1:
        raise InputError("expected one of --tokens, --steps and --hours")
    if request.batch_tokens < request.device_tokens:
        request = replace(request, device_tokens=request.batch_tokens)
    if request.device_tokens < request.max_length:
        raise InputError(
            f"expected passes of at least --max-length {request.max_length} tokens, got "
            f"--batch-tokens {request.batch_tokens}, --device-tokens {request.device_tokens}"
        )
    mask_schedule(request.mask)
    files = files_of(request.texts)
    tokenizer = tokenizer_for(request, files)
    corpus = Corpus.prepare(
        files,
        tokenizer,
        column=request.column,
        language=request.language,
        cache_dir=request.cache_dir,
    )
    transformers.set_seed(request.seed)
    return Pretraining(request, tokenizer, corpus, *model_for(request, tokenizer))


class Pretraining:
    """A run that is prepared: `plan` it, then `train`."""

    def __init__(
        self,
        request: Request,
        tokenizer: PreTrainedTokenizerBase,
        corpus: Corpus,
        model: PreTrainedModel,
        new: list[str],
    ):
        self.request, self.tokenizer, self.corpus, self.model = request, tokenizer, corpus, model
        self.new = new  # parameters that the checkpoint did not have
        few = corpus.num_documents < (4 if request.nsp else 2)
        share = 0.0 if few else request.held_out
        self.train_documents, self.held_documents = corpus.split(share, request.seed)
        self.data = SegmentDataset(corpus, tokenizer, pairs=request.nsp)
        masking = Masking(tokenizer, seed=request.seed, whole_words=request.whole_words)
        self.collator = PackedCollator(model, masking=masking)
        self.processes = Processes.here(request.device, fsdp=request.fsdp, command="pretrain")
        self.device = self.processes.device
        if self.processes.count > 1 and request.hours is not None:
            raise InputError(
                f"expected --tokens or --steps with {self.processes.count} processes, got --hours; "
                "each would find a speed of its own"
            )
        shared = request.device_tokens * self.processes.count
        self.passes = max(round(request.batch_tokens / shared), 1)

    def plan(self) -> Plan:
        """What `train` will do, after a short trial of the model's speed."""
        segments = self._draw(0, self.train_documents)
        lengths = segments.lengths
        tokens = int(lengths.sum())
        cost = self._try_out()
        speed = cost.tokens_per_second * self.processes.count
        # Of the batches of an epoch, since none of them is quite full.
        per_pass = tokens / len(TokenBudgetSampler(lengths, self.request.device_tokens))
        per_step = per_pass * self.passes * self.processes.count
        steps = self._steps(per_step, speed)
        return Plan(
            documents=len(self.train_documents),
            held_out_documents=len(self.held_documents),
            tokens=tokens,
            bad_lines=self.corpus.num_bad,
            examples=len(lengths),
            mean_length=float(lengths.mean()),
            padding_removed=1 - tokens / (len(lengths) * int(lengths.max())),
            parameters=sum(p.numel() for p in self.model.parameters()),
            new=tuple(self.new),
            steps=steps,
            tokens_per_step=per_step,
            passes_per_step=self.passes,
            warmup_steps=math.ceil(_WARMUP * steps),
            epochs=steps * per_step / tokens,
            cost=cost,
            processes=self.processes.count,
        )

    def _steps(self, per_step: float, speed: float) -> int:
        if self.request.steps is not None:
            return self.request.steps
        begun = RunFolder(self.request.output, "pretrain").facts()
        if self.request.hours is not None and "steps" in begun:
            return begun["steps"]  # the speed of then counts
        tokens = self.request.tokens or self.request.hours * 3600 * speed
        if tokens < per_step:
            raise InputError(
                f"expected at least the {per_step:,.0f} tokens of one step, got {tokens:,.0f}; "
                "train longer, or with a smaller --batch-tokens"
            )
        return int(tokens / per_step)

    def _draw(self, epoch: int, documents: np.ndarray) -> Segments:
        return draw(
            self.corpus, documents, max_length=self.request.max_length, pairs=self.request.nsp,
            seed=self.request.seed, epoch=epoch,
        )  # fmt: skip

    def batches(self, count: int, **share: int) -> DrawnBatches:
        """The batches of a run of so many; of one process by its ``rank`` and ``world_size``."""
        return DrawnBatches(
            partial(self._draw, documents=self.train_documents),
            self.request.device_tokens,
            count,
            seed=self.request.seed,
            probability=mask_schedule(self.request.mask),
            **share,
        )

    def _try_out(self) -> Cost:
        batches = self.batches(_PROBE_BATCHES, rank=0, world_size=1)
        made = (self.collator([self.data[key] for key in drawn]) for drawn in batches)
        return try_out(self.model, made, self.device, bf16=self.processes.bf16)

    def facts(self, steps: int) -> dict[str, Any]:
        """What the run follows from, for `RunFolder.begin`."""
        asked = asdict(self.request)
        for name in ("texts", "output", "cache_dir", "workers", "device", "column", "language",
                     "model", "tokenizer", "tokens", "hours"):  # fmt: skip
            asked.pop(name)
        return {
            **asked,
            "steps": steps,
            "texts": self.corpus.digest,  # and of the tokenizer
            "model": self.request.model and weights_digest(self.model, without=self.new),
            "world_size": self.processes.count,
            "_texts": list(self.request.texts),
            "_model": self.request.model,
            "_tokenizer": self.request.tokenizer,
            "_machine": machine_facts(self.device.type),
        }

    def train(
        self,
        plan: Plan,
        *,
        allow: Iterable[str] = (),
        callbacks: Iterable[TrainerCallback] = (),
    ) -> Verdict:
        """Train, from the start or from the last checkpoint in the folder of the run.

        Args:
            allow: facts that may have changed since it was begun.
            callbacks: for the Trainer.

        Raises:
            InputError, OutputError: as `RunFolder`.
            NotFinite: the loss is not finite any more.
            SystemExit: a signal came, and a checkpoint was written: 128 and its number.
        """
        run = RunFolder(self.request.output, "pretrain", is_main=self.processes.is_main)
        return train_in(
            run,
            self.processes,
            self.facts(plan.steps),
            allow=allow,
            make_trainer=partial(self._trainer, plan, [*callbacks]),
            verdict=partial(self._verdict, plan),
            describe=partial(self._describe, plan),
        )

    def _trainer(
        self,
        plan: Plan,
        callbacks: list[TrainerCallback],
        run: RunFolder,
        stop: Callable[[], bool],
    ) -> PretrainingTrainer:
        request = self.request
        evaluates = bool(self.held_documents.size)
        args = arguments_for(
            run,
            self.processes,
            evaluate_every=(request.evaluate_every or request.save_every) if evaluates else None,
            max_steps=plan.steps,
            gradient_accumulation_steps=self.passes,
            learning_rate=request.learning_rate or (5e-5 if request.model else 5e-4),
            weight_decay=0.01,
            warmup_steps=plan.warmup_steps,
            seed=request.seed,
            save_steps=request.save_every,
            dataloader_num_workers=request.workers,
        )
        share = {"rank": args.process_index, "world_size": args.world_size}
        return PretrainingTrainer(
            self.model,
            args,
            dataset=self.data,
            data_collator=self.collator,
            batches=self.batches(plan.steps * self.passes, **share),
            held_out=self._held_out(share) if evaluates else None,
            run=run,
            patience=request.patience,
            stop=stop,
            processing_class=self.tokenizer,
            callbacks=callbacks,
        )

    def _held_out(self, share: dict[str, int]) -> DrawnBatches:
        drawer = partial(self._draw, documents=self.held_documents)
        tokens = self.request.device_tokens
        count = len(TokenBudgetSampler(drawer(0).lengths, tokens, rank=0, world_size=1))
        count = min(count, math.ceil(_HELD_OUT_TOKENS / tokens))
        count = max(count // share["world_size"], 1)
        return DrawnBatches(drawer, tokens, count, seed=self.request.seed, **share)

    def _verdict(self, plan: Plan, run: RunFolder, overhead: float | None) -> Verdict:
        found = [line for line in run.metrics() if "eval_loss" in line]
        before, after = (found[0], found[-1]) if found else (None, None)
        return Verdict(before, after, self._most_frequent(), plan.steps, overhead)

    def _most_frequent(self) -> float | None:
        """How often the token that training has most of is right on the held-out documents."""
        if not self.held_documents.size:
            return None
        size = len(self.tokenizer)
        held = sum(
            np.bincount(self.corpus.tokens(*self.corpus.starts[d : d + 2]), minlength=size)
            for d in self.held_documents
        )
        return float(held[(self.corpus.counts(size) - held).argmax()] / held.sum())

    def _describe(self, plan: Plan, folder: Path, verdict: Verdict) -> None:
        name = self.request.model or f"a {self.request.size} model from scratch"
        rows = "\n".join(f"| {what} | {text} |" for what, text in plan.lines() if what != "time")
        (folder / "README.md").write_text(
            "---\nlibrary_name: transformers\npipeline_tag: fill-mask\n---\n\n"
            f"# {Path(self.request.output).name}\n\n"
            f"A BERT, pre-trained by `fastbert pretrain` ({fastbert.__version__}) from {name}"
            f"{' with next-sentence prediction' if self.request.nsp else ''}, "
            f"{self.request.mask} of the tokens masked.\n\n"
            f"Texts: {', '.join(Path(text).name for text in self.request.texts)} "
            f"(digest {self.corpus.digest}).\n\n| | |\n|---|---|\n{rows}\n\n{verdict}\n",
            "utf-8",
        )
