"""``python -m fastbert.benchmarks.short_texts``: where the time of one text goes on a CPU, in the
layers of a frozen model and around them.

The layers put the code and data of everything else out of the caches, so what is around them takes
longer than by itself, which is timed too. So is a product with hardly any arithmetic: it is what a
call of torch's operator costs, of which a layer makes four.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import NamedTuple
from unittest.mock import patch

import torch

from fastbert import frozen
from fastbert.ops import onednn

from .encoders import Encoders
from .results import machine_facts
from .shapes import MODELS

__all__ = ["Parts", "main", "parts_of", "seconds_of_a_product"]


class Parts(NamedTuple):
    """Seconds of one call, medians.

    Attributes:
        call: all of it.
        layers: in it.
        around: the rest.
        alone: that, in calls without layers.
    """

    call: float
    layers: float
    around: float
    alone: float


def parts_of(encoders: Encoders, length: int, *, rounds: int) -> Parts:
    """Time one text of ``length`` tokens.

    Raises:
        AssertionError: the result is not transformers', or no layer ran on oneDNN.
    """
    model, encode = encoders.make_frozen(True), frozen.encode_on_onednn
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, MODELS[encoders.size].vocab_size, (1, length), generator=generator)
    spent: list[float] = []

    def timed(*args):
        start = time.perf_counter()
        found = encode(*args)
        spent.append(time.perf_counter() - start)
        return found

    def calls() -> list[float]:
        taken = []
        for _ in range(rounds + 3):  # the first ones make copies and primitives
            start = time.perf_counter()
            model(input_ids=ids)
            taken.append(time.perf_counter() - start)
        return taken[3:]

    with torch.inference_mode():
        with patch.object(frozen, "encode_on_onednn", timed):
            found = model(input_ids=ids).last_hidden_state
            expected = encoders.sdpa(input_ids=ids).last_hidden_state
            assert torch.allclose(found, expected, atol=1e-4), "not transformers' result"
            assert spent, "no layer ran on oneDNN"
            spent.clear()
            taken = calls()
        layers = spent[3:]
        around = [a - b for a, b in zip(taken, layers, strict=True)]
        with patch.object(frozen, "encode_on_onednn", lambda rows, *rest: rows):
            alone = calls()
    return Parts(*map(statistics.median, (taken, layers, around, alone)))


def seconds_of_a_product(*, rounds: int) -> float:
    """Of 16 rows by 16 x 16, from a packed weight."""
    x, weight, bias = torch.randn(16, 16), onednn.packed(torch.randn(16, 16)), torch.randn(16)
    taken = []
    with torch.inference_mode():
        for _ in range(rounds):
            start = time.perf_counter()
            for _ in range(1000):
                onednn.product(x, weight, bias, None)
            taken.append((time.perf_counter() - start) / 1000)
    return statistics.median(taken)


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--rounds", type=int, default=200)
    given = parser.parse_args()
    facts = machine_facts("cpu")
    print(f"{facts['device']}, {torch.get_num_threads()} threads, torch {facts['torch']}\n")
    product = seconds_of_a_product(rounds=9)
    print(f"A product of 16 rows by 16 x 16: {1e6 * product:.1f} us.\n")
    print("| one text, frozen | call, ms | layers, ms | around them, ms | without layers, ms |")
    print("|---|---|---|---|---|")
    for model in given.model or ("minilm", "base"):
        encoders = Encoders(model, torch.float32, "cpu")
        for length in (16, 32, 64, 128):
            found = parts_of(encoders, length, rounds=given.rounds)
            figures = " | ".join(f"{1e3 * seconds:.2f}" for seconds in found)
            print(f"| {model} S{length} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
