"""Semantic search over the passages with real weights, and the same work done by transformers.

    python -m fastbert.demo [--question "..."] [--rounds N] [--json FILE]

Exits with 1 if the two differ by more than the tolerance.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

import fastbert
from fastbert.demo import model_folder, passages
from fastbert.tasks.embed import Embedder
from fastbert.tasks.errors import TaskError
from fastbert.tasks.loading import resolve_device

QUESTIONS = (
    "Why is the sky blue?",
    "Who was the first person to walk on the moon?",
    "What makes dough rise?",
    "How do ships get from one ocean to the other?",
    "Why do we need to rest at night?",
    "How did a doctor find out that dirty water spreads disease?",
)
TOLERANCE = 1e-5
TOP = 3


def batches(embedder: Embedder, texts: list[str], size: int = 32) -> list[dict]:
    """Padded batches in the order of the texts, as a plain loop over a file would make them."""
    rows = embedder.tokenize(texts)
    return [embedder.collate(rows[i : i + size]) for i in range(0, len(rows), size)]


def embed(embedder: Embedder, prepared: list[dict]) -> np.ndarray:
    return np.concatenate([embedder.encode(batch) for batch in prepared])


def search(console: Console, embedder: Embedder, questions, texts, vectors: np.ndarray) -> None:
    """Print the best passages for each question."""
    for question, vector in zip(questions, embedder.embed(list(questions)), strict=True):
        scores = vectors @ vector
        table = Table("score", "passage", "begins", title=question, title_justify="left")
        for i in np.argsort(-scores)[:TOP]:
            words = texts[i]["text"].split()
            start = " ".join(words[:12]) + (" ..." if len(words) > 12 else "")
            table.add_row(f"{scores[i]:.2f}", texts[i]["title"], start)
        console.print(table)


def compare(ours: Embedder, theirs: Embedder, prepared, rounds: int) -> dict[str, float]:
    """Embed the same batches with both, in turn, and compare results and times."""
    expected, actual = embed(theirs, prepared), embed(ours, prepared)  # also the warm-up
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for name, embedder in (("theirs", theirs), ("ours", ours)):
            start = time.perf_counter()
            embed(embedder, prepared)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    real = sum(int(batch["attention_mask"].sum()) for batch in prepared)
    padded = sum(batch["attention_mask"].numel() for batch in prepared)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    ratios = [a / b for a, b in zip(times["theirs"], times["ours"], strict=True)]
    return {
        "largest_difference": float(np.abs(expected - actual).max()),
        "transformers_s": seconds["theirs"],
        "fastbert_s": seconds["ours"],
        "speedup": statistics.median(ratios),
        "transformers_tokens_per_s": real / seconds["theirs"],
        "fastbert_tokens_per_s": real / seconds["ours"],
        "real_tokens": real,
        "padding_removed": 1 - real / padded,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--question", action="append", help="ask this instead; may be repeated")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="also write the comparison to this file")
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    console = Console()
    try:
        folder, device = model_folder(), resolve_device(args.device)
        ours = Embedder.load(folder, device=device)
        theirs = Embedder.load(folder, device=device, accelerated=False)
    except TaskError as error:
        Console(stderr=True).print(f"demo: {error}", markup=False)
        return error.exit_code
    texts = passages()
    console.print(
        f"[bold]{len(texts)} passages[/], all-MiniLM-L6-v2 in fp32 on {device}, "
        f"fastbert {fastbert.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}\n"
    )
    prepared = batches(ours, [passage["text"] for passage in texts])
    vectors = embed(ours, prepared)
    search(console, ours, args.question or QUESTIONS, texts, vectors)

    console.print(f"\nThe same {len(prepared)} batches with transformers (sdpa), in turn ...")
    result = compare(ours, theirs, prepared, args.rounds)
    table = Table("", "transformers", "fastbert", title="All passages, median of rounds")
    table.add_row(
        "time", f"{1e3 * result['transformers_s']:.0f} ms", f"{1e3 * result['fastbert_s']:.0f} ms"
    )
    table.add_row(
        "real tokens per second",
        f"{result['transformers_tokens_per_s']:,.0f}",
        f"{result['fastbert_tokens_per_s']:,.0f}",
    )
    console.print(table)
    agree = result["largest_difference"] <= TOLERANCE
    console.print(
        f"speed-up [bold]{result['speedup']:.2f}x[/], "
        f"{100 * result['padding_removed']:.0f} % of all positions were padding and skipped\n"
        f"largest difference of any embedding value {result['largest_difference']:.1e} "
        f"({'within' if agree else '[red]OVER[/]'} {TOLERANCE:.0e})"
    )
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
