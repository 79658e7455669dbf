"""A file of texts to their scores: the job behind ``fastbert score``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..tasks.durable import write_text
from ..tasks.errors import InputError, OutputError
from ..tasks.reading import BadRow, Row, TextFile
from .masked import MaskedModel
from .scoring import score, token_ids

__all__ = ["ScoredFile", "score_file"]


class ScoredFile(NamedTuple):
    """What was done.

    Attributes:
        lines: of JSON, where no file was asked for.
        count, tokens, perplexity: of all texts together.
        skipped: rows that were left out.
    """

    lines: list[str]
    count: int
    tokens: int
    perplexity: float
    skipped: list[BadRow]


def score_file(
    model: MaskedModel,
    texts: TextFile,
    output: Path | None = None,
    *,
    skip: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> ScoredFile:
    """Score every text of a file.

    Args:
        output: ``.jsonl``, which appears whole or not at all.
        skip: leave bad rows out, instead of stopping before any work.
        progress: called with the texts that are done and those there are.

    Raises:
        InputError: a bad row, such as one that is too long for the model, or no other one.
        OutputError: a file of another kind, or one that cannot be written.
    """
    if output is not None and output.suffix != ".jsonl":
        raise OutputError(f"expected an output of .jsonl, got {str(output)!r}")
    good, bad = [], []
    for row in texts.rows():
        row = _checked(model, row) if isinstance(row, Row) else row
        (good if isinstance(row, Row) else bad).append(row)
    if bad and not skip:
        raise InputError(
            f"{texts.name}, line {bad[0].line}: {bad[0].reason} ({len(bad)} bad rows in all); mend "
            "them or pass --on-error skip. Nothing was written"
        )
    if not good:
        raise InputError(f"expected at least one text in {texts.name!r}, got none")
    lines, total, tokens = [], 0.0, 0
    for row, found in zip(good, score(model, [row.text for row in good]), strict=True):
        total, tokens = total + found.log_likelihood, tokens + found.tokens
        told = {"line": row.line, "text": row.text, **found._asdict()}
        told["perplexity"] = found.perplexity
        lines.append(json.dumps(told, ensure_ascii=False))
        progress(len(lines), len(good))
    if output is not None:
        _write(output, "".join(f"{line}\n" for line in lines))
        lines.clear()
    return ScoredFile(lines, len(good), tokens, math.exp(-total / tokens), bad)


def _checked(model: MaskedModel, row: Row) -> Row | BadRow:
    try:
        token_ids(model, row.text)
    except InputError as error:
        return BadRow(row.line, str(error))
    return row


def _write(output: Path, text: str) -> None:
    try:
        write_text(output, text)
    except OSError as error:
        with suppress(OSError):
            output.with_name(f"{output.name}.new").unlink(missing_ok=True)
        raise OutputError(
            f"cannot write {str(output)!r}: {error.strerror or error}; what was there before is as "
            "it was"
        ) from error
