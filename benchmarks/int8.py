"""``python -m fastbert.benchmarks.int8``: what int8 gains on a CPU and costs, against fp32 and ONNX
Runtime.

Frozen in fp32, frozen in int8, and ONNX Runtime's dynamic quantisation of the same weights (each
output's weights by a scale of its own, rows by one for all), in turns. Cosines are of the last
hidden states, rows of random weights, with those of transformers in fp32.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .encoders import Encoders, Inputs
from .results import machine_facts
from .shapes import MODELS, draw_lengths

__all__ = ["Compared", "compare", "main", "ways_of"]

FP32, INT8, PEER = "fastbert, frozen", "fastbert, int8", "ONNX Runtime, int8"
_SHAPES = (
    (1, 16, "fixed"), (1, 32, "fixed"), (1, 128, "fixed"), (8, 128, "fixed"), (8, 128, "uniform"),
)  # fmt: skip


class Compared(NamedTuple):
    """One way to run a batch.

    Attributes:
        seconds: the median.
        cosine: the smallest of any row with that of transformers in fp32.
    """

    seconds: float
    cosine: float


def _quantised_session(encoders: Encoders) -> Callable[[Inputs], Tensor]:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path: Path = encoders.get("onnx")
    target = path.with_name("int8.onnx")
    logging.disable(logging.WARNING)  # it recommends a step that is for images
    quantize_dynamic(path, target, per_channel=True, weight_type=QuantType.QInt8)
    logging.disable(logging.NOTSET)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(target, options, providers=["CPUExecutionProvider"])

    def run(x: Inputs) -> Tensor:
        return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in x.items()})[0])

    return run


def _ours(encoders: Encoders, frozen: bool | str) -> Callable[[Inputs], Tensor]:
    model = encoders.make_frozen(frozen)

    def run(x: Inputs) -> Tensor:
        with torch.inference_mode():
            return model(**x).last_hidden_state

    return run


def ways_of(encoders: Encoders) -> dict[str, Callable[[Inputs], Tensor]]:
    """All that is installed, by name."""
    ways = {FP32: _ours(encoders, True), INT8: _ours(encoders, "int8")}
    if all(map(importlib.util.find_spec, ("onnxruntime", "onnx", "onnxscript"))):
        ways[PEER] = _quantised_session(encoders)
    return ways


def compare(
    ways: dict[str, Callable[[Inputs], Tensor]],
    encoders: Encoders,
    batch: int,
    length: int,
    lengths: str,
    *,
    rounds: int,
) -> dict[str, Compared]:
    """Run all in turns.

    Args:
        ways: from `ways_of`.
        encoders: what they were made of.
        batch, length, lengths: of the batch; the last one as of `draw_lengths`.
        rounds: turns of each.

    Raises:
        AssertionError: fp32 is not transformers' result.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = MODELS[encoders.size].vocab_size
    ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
    ends = torch.tensor(draw_lengths(lengths, batch, length))
    real = torch.arange(length) < ends[:, None]
    x = {"input_ids": ids, "attention_mask": real.long()}
    with torch.inference_mode():
        expected = encoders.sdpa(**x).last_hidden_state[real]
    cosines = {
        name: F.cosine_similarity(run(x)[real], expected, dim=-1).min().item()
        for name, run in ways.items()
    }
    assert cosines[FP32] > 1 - 1e-5, f"{FP32}: a cosine of {cosines[FP32]} with transformers"
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            time.sleep(0.1)  # threads of the last one go on spinning for a while
            run(x)  # what that one has put out of the caches is back
            start = time.perf_counter()
            run(x)
            taken[name].append(time.perf_counter() - start)
    return {name: Compared(statistics.median(taken[name]), cosines[name]) for name in ways}


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    facts = machine_facts("cpu")
    print(f"{facts['device']}, {torch.get_num_threads()} threads, torch {facts['torch']}\n")
    print(f"| | {FP32}, ms | {INT8}, ms | gain | {PEER}, ms | cosine, {INT8} | cosine, {PEER} |")
    print("|---|---|---|---|---|---|---|")
    for model in given.model or ("minilm", "base"):
        encoders = Encoders(model, torch.float32, "cpu")
        ways = ways_of(encoders)
        for batch, length, lengths in _SHAPES:
            found = compare(ways, encoders, batch, length, lengths, rounds=given.rounds)
            name = f"{model} B{batch} S{length}" + (", ragged" if lengths == "uniform" else "")
            exact, ours = found[FP32], found[INT8]
            peer = found.get(PEER, Compared(math.nan, math.nan))
            print(
                f"| {name} | {1e3 * exact.seconds:.1f} | "
                f"{1e3 * ours.seconds:.1f} | {exact.seconds / ours.seconds:.2f}x | "
                f"{1e3 * peer.seconds:.1f} | {ours.cosine:.4f} | {peer.cosine:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
