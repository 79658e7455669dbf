"""Does it change my results? ``python -m fastbert.benchmarks.accuracy``, on a real model.

The demo's passages and their titles are embedded by transformers in fp64, and every other way is
compared with that: how far vectors are off, and whether a search finds the same. What transformers
itself is off by in the same dtype is the yardstick.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbert
from fastbert.demo import passages
from fastbert.ops import onednn_int8
from fastbert.ops.backend import resolve
from fastbert.tasks.loading import minilm_folder, quiet, resolve_device

from .results import machine_facts

__all__ = ["Row", "measure"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NEAREST = 10


class Row(NamedTuple):
    """One way to embed, compared with fp64.

    Attributes:
        library: ``"transformers"`` or ``"fastbert"``, with options.
        off_by: the largest difference of a component of a vector, whose length is 1.
        cosine: the smallest cosine between a vector and its like.
        first, ten: the share of titles for which the nearest passage, and all ten nearest in their
            order, are those of fp64.
        set_of_ten: the share for which the ten nearest are the same in any order.
    """

    library: str
    dtype: str
    off_by: float
    cosine: float
    first: float
    ten: float
    set_of_ten: float


def _vectors(model: nn.Module, texts: list[str]) -> Tensor:
    found = model.encode(texts, batch_size=32, convert_to_tensor=True)
    return F.normalize(found.double(), dim=1)


def _ways(model: nn.Module, device: torch.device) -> Iterator[tuple[str, str, nn.Module]]:
    """Models to compare, made one after the other."""
    copies = device.type == "cpu" and resolve(device, torch.float32) == "torch"
    for name, dtype in _DTYPES.items():
        plain = copy.deepcopy(model).to(dtype)
        yield "transformers", name, plain
        ours = copy.deepcopy(plain)
        fastbert.accelerate(ours)
        yield "fastbert", name, ours
        if copies and name != "fp16":
            frozen = copy.deepcopy(plain)
            fastbert.accelerate(frozen, frozen=True)
            yield "fastbert, frozen", name, frozen
        if copies and name == "fp32" and onednn_int8.available():
            quantised = copy.deepcopy(plain)
            fastbert.accelerate(quantised, frozen="int8")
            yield "fastbert, frozen", "int8", quantised


def measure(device: str = "auto", *, texts: int | None = None) -> Iterator[Row]:
    """Embed with transformers and fastbert in fp32, bf16, fp16 and (on a CPU) int8, and compare
    with fp64.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        texts: passages to read, all of them by default.

    Raises:
        fastbert.tasks.errors.LoadError: the package with the weights is not installed.
    """
    from sentence_transformers import SentenceTransformer

    where = resolve_device(device)
    chosen = passages()[:texts]
    titles, found = [p["title"] for p in chosen], [p["text"] for p in chosen]
    with quiet():
        model = SentenceTransformer(str(minilm_folder()), device=str(where))
    exact = [_vectors(copy.deepcopy(model).double(), part) for part in (titles, found)]
    expected = (exact[0] @ exact[1].T).topk(_NEAREST).indices
    for library, dtype, other in _ways(model, where):
        mine = [_vectors(other, part) for part in (titles, found)]
        ranks = (mine[0] @ mine[1].T).topk(_NEAREST).indices
        same = ranks == expected
        yield Row(
            library,
            dtype,
            max((a - b).abs().max().item() for a, b in zip(mine, exact, strict=True)),
            min((a * b).sum(1).min().item() for a, b in zip(mine, exact, strict=True)),
            same[:, 0].double().mean().item(),
            same.all(1).double().mean().item(),
            (ranks.sort().values == expected.sort().values).all(1).double().mean().item(),
        )


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--texts", type=int, help="passages to read, all of them by default")
    given = parser.parse_args()
    where = resolve_device(given.device)
    facts = machine_facts(where.type)
    print(
        f"{facts['device']}, torch {facts['torch']}, transformers {facts['transformers']}, "
        f"fastbert on {resolve(where, torch.float32)}\n"
    )
    print("| | | largest difference | smallest cosine | nearest the same | ten nearest the same |")
    print("|---|---|---|---|---|---|")
    for row in measure(given.device, texts=given.texts):
        print(
            f"| {row.dtype} | {row.library} | {row.off_by:.1e} | {row.cosine:.7f} | "
            f"{row.first:.1%} | {row.set_of_ten:.1%}, in order {row.ten:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
