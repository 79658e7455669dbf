"""A file of texts to a file of embeddings: the job behind ``fastbert embed``."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import fastbert

from .embed import WINDOW, Embedder
from .errors import InputError, TaskError
from .reading import Row, Scan, TextFile
from .writing import VectorFile

__all__ = ["Embedded", "embed_file"]


class Embedded(NamedTuple):
    """What was done.

    Attributes:
        num_rows, size: embeddings in the file, and values of each.
        resumed: how many of them an earlier run had made.
        discarded: how many an unfinished run had made that was not resumed.
    """

    num_rows: int
    size: int
    resumed: int
    discarded: int


def embed_file(
    texts: TextFile,
    output: Path | str,
    embedder: Embedder,
    *,
    scan: Scan | None = None,
    batch_tokens: int = 16384,
    resume: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Embedded:
    """Embed every text of a file; lines that hold none are left out.

    Args:
        texts: the file.
        output: ``.npy``, ``.parquet``, ``.jsonl`` or ``.csv``, as `fastbert.tasks.writing` says.
        embedder: the model.
        scan: of ``texts``, if somebody wanted to see it before this starts.
        batch_tokens: real tokens in one forward pass.
        resume: go on with an unfinished run for ``output``, and leave this one to be resumed.
            The result is the same to the bit on the same machine.
        progress: called with the texts that are done and those there are.

    Raises:
        InputError: ``texts`` cannot be read, holds no text, or changes meanwhile.
        OutputError: ``output`` cannot be written, or the unfinished run was another one.
        TaskError: a vector that is not finite.
    """
    scan = scan or texts.scan()
    if scan.num_rows == 0:
        raise InputError(f"expected at least one text in {texts.name!r}, got none")
    facts = {
        "input": f"{texts.name if texts.is_stdin else texts.path.resolve()} ({scan.digest})",
        "column": texts.column,
        "model": f"{embedder.model.transformers_model.name_or_path} ({embedder.digest()})",
        "prompt": embedder.prompt,
        "max_length": embedder.max_length,
        "windows": embedder.windows,
        "truncate_dim": embedder.truncate_dim,
        "normalize": embedder.normalize,
        "batch_tokens": batch_tokens,
        "device": str(embedder.model.device),
        "dtype": embedder.computes_in,
        "fastbert": fastbert.__version__,
        "torch": torch.__version__,
    }
    output, good = Path(output), (row for row in texts.rows() if isinstance(row, Row))
    file = VectorFile(output, facts, num_rows=scan.num_rows, size=embedder.size, resume=resume)
    with file:
        resumed = file.done
        progress(resumed, scan.num_rows)
        rest = (row.text for row in islice(good, resumed, None))
        for vectors in embedder.stream(rest, batch_tokens=batch_tokens, window=WINDOW):
            _check_finite(vectors, file.done)
            file.append(vectors)
            progress(file.done, scan.num_rows)
        _check_unchanged(texts, scan, file.done)
        file.finish(row for row in texts.rows() if isinstance(row, Row))
    return Embedded(scan.num_rows, embedder.size, resumed, file.discarded)


def _check_finite(vectors: np.ndarray, before: int) -> None:
    wrong = ~np.isfinite(vectors).all(1)
    if wrong.any():
        raise TaskError(
            f"expected finite vectors, got {wrong.sum()} that are not, the first for text "
            f"{before + int(wrong.argmax()) + 1}; float16 overflows with some models: try "
            "--dtype float32 or bfloat16"
        )


def _check_unchanged(texts: TextFile, scan: Scan, found: int) -> None:
    if texts.stamp != scan.stamp or found != scan.num_rows:
        raise InputError(
            f"expected {texts.name!r} to stay as it was, got another file while it was read; "
            "run again when nothing writes to it"
        )
