"""SPLADE's vectors against sentence-transformers: ``python -m fastbert.benchmarks.splade``.

A `SparseEncoder` of MiniLM's size reads passages of the demo, as it comes (transformers with sdpa)
and accelerated, in turns: encoding, and the forward and backward pass of a training step. The head
has random weights, on which times do not depend. A check that both say the same comes first.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastbert
from fastbert.demo import passages
from fastbert.tasks.loading import minilm_folder, quiet, resolve_device
from fastbert.testing import assert_within_budget

from .results import machine_facts

__all__ = ["Compared", "compare"]

_OF_A_STEP = 4  # one of so many texts


class Compared(NamedTuple):
    """Seconds, medians over rounds: ``(fastbert, as it comes)``."""

    encoding: tuple[float, float]
    training: tuple[float, float]


def _encoder(device: torch.device) -> nn.Module:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    torch.manual_seed(0)
    with quiet():
        first = Transformer(
            str(minilm_folder()), transformer_task="fill-mask",
            model_kwargs={"attn_implementation": "sdpa"},
        )  # fmt: skip
    return SparseEncoder(modules=[first, SpladePooling()], device=str(device)).eval()


def _encode(model: nn.Module, texts: list[str]) -> Tensor:
    return model.encode(texts, convert_to_sparse_tensor=False)


def _step(model: nn.Module, texts: list[str]) -> None:
    model.train()
    features = {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in model.preprocess(texts).items()
    }
    vectors = model(features)["sentence_embedding"]
    (vectors @ vectors.T).sum().backward()
    model.zero_grad()
    model.eval()


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(*, texts: int = 64, rounds: int = 5, device: str = "auto") -> Compared:
    """Run both in turns.

    Args:
        texts: passages to encode; a step of training has a quarter of them.
        rounds: turns of each.

    Raises:
        AssertionError: ours is not as exact as theirs.
    """
    where, chosen = resolve_device(device), [p["text"] for p in passages()][:texts]
    model = _encoder(where)
    few = chosen[: max(texts // _OF_A_STEP, 8)]  # fewer say little about rounding
    exact, theirs = _encode(copy.deepcopy(model).double(), few), _encode(model, few)
    with fastbert.accelerate(model):
        assert_within_budget(_encode(model, few), exact, theirs, "SPLADE vectors")
    medians = []
    for run in (lambda: _encode(model, chosen), lambda: _step(model, few)):
        run()
        taken: list[tuple[float, float]] = []
        for _ in range(rounds):
            plain = _seconds(run, where)
            with fastbert.accelerate(model):
                taken.append((_seconds(run, where), plain))
        medians.append(tuple(map(statistics.median, zip(*taken, strict=True))))
    return Compared(*medians)


def main() -> None:
    """Print both and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    found = compare(**vars(given))
    facts = machine_facts(resolve_device(given.device).type)
    print(
        f"{given.texts} texts, {facts['device']}, torch {facts['torch']}, transformers "
        f"{facts['transformers']}, sentence-transformers {facts['sentence-transformers']}"
    )
    for name, (ours, theirs) in found._asdict().items():
        print(f"{name}: {ours:.2f} s against {theirs:.2f} s, {theirs / ours:.2f}x")


if __name__ == "__main__":
    main()
