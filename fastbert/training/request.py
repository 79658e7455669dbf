"""What a run of ``fastbert pretrain`` is told and what it tells: request, plan, verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..tasks.errors import InputError
from .cost import Cost

__all__ = ["Plan", "Request", "Verdict", "mask_schedule"]


@dataclass(frozen=True)
class Request:
    """What was asked for; the names are the options of the command.

    Attributes:
        texts: files, folders and globs.
        output: the folder of the run.
        model: a checkpoint to go on with, or None for a ``size`` from scratch.
        tokenizer: a folder, by default that of ``model``; without both one is trained.
        vocab_size: of a tokenizer that is trained; ``cased``: it keeps case.
        tokens, steps, hours: how long, one of them.
        batch_tokens: of a step, of all processes.
        device_tokens: of one forward and backward pass.
        max_length: of an example.
        mask: share of the tokens, or ``first:last``.
        nsp: next-sentence prediction.
        learning_rate: at its highest, None for what suits the model.
        held_out: share of the documents that are evaluated on.
        patience: evaluations without gain that end the run.
        fsdp: parameters, gradients and moments are shared out among the processes.
    """

    texts: tuple[str, ...]
    output: str
    model: str | None = None
    size: str = "small"
    tokenizer: str | None = None
    vocab_size: int = 30522
    cased: bool = False
    column: str | None = None
    language: str = "en"
    tokens: int | None = None
    steps: int | None = None
    hours: float | None = None
    batch_tokens: int = 32768
    device_tokens: int = 8192
    max_length: int = 128
    mask: str = "0.15"
    nsp: bool = True
    whole_words: bool = False
    learning_rate: float | None = None
    held_out: float = 0.01
    save_every: int = 500
    evaluate_every: int | None = None
    patience: int | None = None
    seed: int = 0
    workers: int = 0
    device: str = "auto"
    fsdp: bool = False
    cache_dir: str | None = None


def mask_schedule(text: str) -> Callable[[float], float]:
    """``0.15``, or ``0.30:0.15``: a share that falls, or rises, evenly from the first to the last
    (Ankner et al., 2305.15096). From the share of the run that is over to the share of tokens.

    Raises:
        InputError: not one or two numbers between 0 and 1.
    """
    try:
        first, last = (
            float(part) for part in (text if ":" in text else f"{text}:{text}").split(":")
        )
    except ValueError:
        first = last = math.nan
    if not (0 < first < 1 and 0 < last < 1):
        raise InputError(
            f"expected --mask to be a share such as 0.15, or two such as 0.30:0.15, got {text!r}"
        )
    return lambda over: first + (last - first) * over


class Plan(NamedTuple):
    """What a run will do, in the order in which it is told."""

    documents: int
    held_out_documents: int
    tokens: int
    bad_lines: int
    examples: int
    mean_length: float
    padding_removed: float
    parameters: int
    new: tuple[str, ...]
    steps: int
    tokens_per_step: float
    passes_per_step: int
    warmup_steps: int
    epochs: float
    cost: Cost
    processes: int

    @property
    def tokens_per_second(self) -> float:
        """Of all processes."""
        return self.cost.tokens_per_second * self.processes

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return self.steps * self.tokens_per_step / self.tokens_per_second

    def matrix_share(self, tokens_per_second: float) -> float | None:
        """Share of the rate of a large product that training at this speed has."""
        if self.cost.matrix_rate is None:
            return None
        return (
            tokens_per_second * self.cost.flops_per_token / (self.cost.matrix_rate * self.processes)
        )

    def lines(self) -> Iterator[tuple[str, str]]:
        """What is told, with its name."""
        yield "documents", f"{self.documents:,}, {self.held_out_documents:,} more held out"
        if self.bad_lines:
            yield "left out", f"{self.bad_lines:,} lines that hold no text"
        yield "tokens", f"{self.tokens:,} in an epoch"
        yield (
            "examples",
            (
                f"{self.examples:,} of {self.mean_length:.0f} tokens on average; "
                f"{self.padding_removed:.0%} of padded batches would be padding"
            ),
        )
        yield "parameters", f"{self.parameters:,}"
        if self.new:
            shown = ", ".join(self.new[:2])
            yield "new", f"{len(self.new)} that the checkpoint does not have ({shown}, ...)"
        yield (
            "steps",
            (
                f"{self.steps:,} of {self.passes_per_step} passes, {self.epochs:.2f} epochs; "
                f"{self.warmup_steps:,} to warm up"
            ),
        )
        cost = self.cost
        yield (
            "memory",
            (
                f"{_size(cost.state_bytes)} of parameters, gradients and moments, "
                f"{_size(cost.kept_bytes)} kept for backward in a pass"
            ),
        )
        share = self.matrix_share(self.tokens_per_second)
        of_machine = "" if share is None else f", {share:.0%} of the machine's matrix rate"
        yield (
            "time",
            (
                f"{_duration(self.seconds)} at {self.tokens_per_second:,.0f} tokens a second"
                f"{of_machine}; evaluations not counted"
            ),
        )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _size(count: int) -> str:
    return f"{count / 2**20:,.0f} MB" if count < 2**30 else f"{count / 2**30:,.1f} GB"


class Verdict(NamedTuple):
    """What a run has come to, on the documents that are held out.

    Attributes:
        before, after: metrics of the evaluations, None where nothing is held out.
        most_frequent: accuracy of always saying the most frequent token.
        steps: that were trained.
        overhead: share of the time that the model did not take; None where nothing was trained.
    """

    before: dict[str, float] | None
    after: dict[str, float] | None
    most_frequent: float | None
    steps: int
    overhead: float | None

    def __str__(self) -> str:
        if self.after is None:
            return f"{self.steps} steps; no document was held out, so nothing was evaluated"
        parts = [f"{self.steps} steps; held out: perplexity {self._both('perplexity', '.1f')}"]
        parts.append(
            f"masked tokens right {self._both('mlm_accuracy', '.1%')} "
            f"(always the most frequent token: {self.most_frequent:.1%})"
        )
        if "eval_nsp_accuracy" in self.after:
            parts.append(f"next sentences right {self._both('nsp_accuracy', '.1%')}")
        return ", ".join(parts)

    def _both(self, name: str, form: str) -> str:
        values = (self.before[f"eval_{name}"], self.after[f"eval_{name}"])
        return " -> ".join(format(value, form) for value in values)
