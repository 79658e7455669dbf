"""Steps of ``fastbert pretrain`` against those of transformers' Trainer: ``python -m
fastbert.benchmarks.pretraining``.

Masked language modelling from scratch on documents of random words, whose lengths are anything up
to the longest, so that half of a padded batch is padding. Both train on the same examples with the
same masks in each step, AdamW, clipping, dropout and all; the command packs them and runs the head
on masked tokens, transformers' own class has them padded to the longest of a batch, with sdpa. A
step is timed from its end to the end of the next, so that data and bookkeeping count. The two take
turns.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fastbert.demo import model_folder
from fastbert.tasks.loading import quiet
from fastbert.training import PackedCollator
from fastbert.training.pretraining import Pretraining, prepare
from fastbert.training.request import Plan, Request

from .results import machine_facts

__all__ = ["Compared", "compare"]


class Compared(NamedTuple):
    """Seconds of each step, and what share of the command's time its model did not take."""

    fastbert: list[float]
    transformers: list[float]
    fill: float
    overhead: float

    @property
    def ratio(self) -> float:
        """How many times as long transformers takes."""
        return statistics.median(self.transformers) / statistics.median(self.fastbert)


class _Ends(TrainerCallback):
    """When steps ended."""

    def __init__(self):
        self.at: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.at.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.at, self.at[1:], strict=False)]


def compare(
    *, size: str = "small", max_length: int = 128, tokens: int = 4096, steps: int = 6,
    rounds: int = 3, tokenizer: Path | str | None = None, device: str = "auto",
) -> Compared:  # fmt: skip
    """Train with both, in turns.

    Args:
        size: of the model, as of ``fastbert pretrain --size``.
        tokens: real ones in a step.
        steps, rounds: how many turns of how many steps; the first of each is not counted.
        tokenizer: a folder; by default that of the demo's model.

    Raises:
        AssertionError: the two have another loss on the first batch.
    """
    with tempfile.TemporaryDirectory() as folder, quiet():
        tokenizer = str(tokenizer or model_folder())
        texts = Path(folder, "texts.txt")
        texts.write_text(_documents(tokenizer, max_length, 4 * tokens * steps), "utf-8")
        request = Request(
            texts=(str(texts),), output=folder, size=size, tokenizer=tokenizer, steps=steps,
            batch_tokens=tokens, device_tokens=tokens, max_length=max_length, nsp=False,
            held_out=0.0, save_every=10**9, device=device, cache_dir=f"{folder}/cache",
        )  # fmt: skip
        pretraining = prepare(request)
        theirs = transformers.BertForMaskedLM._from_config(
            pretraining.model.config, attn_implementation="sdpa"
        )
        theirs.load_state_dict(pretraining.model.state_dict())
        _check(pretraining, theirs)
        plan = pretraining.plan()
        ours, others, overheads = [], [], []
        for turn in range(rounds):
            pretraining.request = replace(request, output=f"{folder}/run-{turn}")
            ends = _Ends()
            verdict = pretraining.train(plan, callbacks=[ends])
            ours += ends.seconds
            overheads.append(verdict.overhead)
            others += _transformers_seconds(pretraining, theirs, plan, f"{folder}/{turn}")
        return Compared(ours, others, 1 - plan.padding_removed, statistics.median(overheads))


def _documents(tokenizer: str, max_length: int, tokens: int) -> str:
    """So many words in sentences; each document is an example of random length."""
    draw = random.Random(0)
    vocabulary = transformers.AutoTokenizer.from_pretrained(tokenizer).get_vocab()
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha())
    documents = []
    while tokens > 0:
        count = draw.randint(4, max_length - 8)
        tokens -= count
        chosen = draw.choices(words, k=count)
        parts = [chosen[i : i + 12] for i in range(0, count, 12)]
        documents.append(" ".join(" ".join(part).capitalize() + "." for part in parts))
    return "\n\n".join(documents)


def _check(pretraining: Pretraining, theirs: torch.nn.Module) -> None:
    """The same loss of the first batch, without dropout."""
    batch, losses = next(iter(pretraining.batches(1))), []
    for model, collator in (
        (pretraining.model, pretraining.collator),
        (theirs, _padded(pretraining)),
    ):
        model.to(pretraining.device).eval()
        inputs = collator([pretraining.data[key] for key in batch])
        with torch.no_grad():
            losses.append(
                model(**{k: v.to(pretraining.device) if torch.is_tensor(v) else v
                         for k, v in inputs.items()}).loss
            )  # fmt: skip
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)


def _padded(pretraining: Pretraining) -> Callable:
    return PackedCollator(padded=True, masking=pretraining.collator.masking)


def _transformers_seconds(
    pretraining: Pretraining, model: torch.nn.Module, plan: Plan, folder: str
) -> list[float]:
    ends = _Ends()
    arguments = TrainingArguments(
        folder, max_steps=plan.steps, gradient_accumulation_steps=plan.passes_per_step,
        bf16=pretraining.processes.bf16, use_cpu=pretraining.device.type == "cpu", logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = _WithBatches(model, arguments, callbacks=[ends], train_dataset=pretraining.data)
    trainer.remove_callback(PrinterCallback)
    trainer.loader = DataLoader(
        pretraining.data,
        batch_sampler=pretraining.batches(plan.steps * plan.passes_per_step),
        collate_fn=_padded(pretraining),
    )
    trainer.train()
    return ends.seconds


class _WithBatches(Trainer):
    """Trains on the batches that it is given."""

    loader: DataLoader

    def get_train_dataloader(self) -> DataLoader:
        return self.loader


def main() -> None:
    """Print both medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--size", default="small")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=4096, help="real ones in a step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    found = compare(**vars(arguments))
    facts = machine_facts("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"{arguments.size}, {arguments.tokens} real tokens a step, padded {found.fill:.0%} full, "
        f"{facts['device']}, torch {facts['torch']}, transformers {facts['transformers']}"
    )
    for name in ("fastbert", "transformers"):
        taken = sorted(getattr(found, name))
        median = statistics.median(taken)
        print(f"{name:>12}: {median:.3f} s a step ({taken[0]:.3f} to {taken[-1]:.3f})")
    print(
        f"{'ratio':>12}: {found.ratio:.2f}x; {found.overhead:.1%} of the command's time is "
        "outside of the model"
    )


if __name__ == "__main__":
    main()
