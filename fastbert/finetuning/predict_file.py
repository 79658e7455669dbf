"""A table to a file of predictions: the job behind ``fastbert predict``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..tasks.durable import take_lock, to_disk, write_json
from ..tasks.errors import InputError, OutputError
from ..tasks.loading import weights_digest
from .predicting import Predictor
from .table import Table

__all__ = ["Predicted", "predict_file"]

_PART = 1024  # rows that are in memory at a time, and on the disk before the next ones


class Predicted(NamedTuple):
    """What became of a file.

    Attributes:
        rows: with a prediction.
        skipped: rows without one, by their number: why.
        cut: rows that were longer than the model takes.
        resumed: how many of the predictions an earlier run had made.
    """

    rows: int
    skipped: dict[int, str]
    cut: int
    resumed: int


class _State(NamedTuple):
    """How far a run is: parts of the table, bytes of the file, rows, rows that were longer."""

    parts: int = 0
    size: int = 0
    rows: int = 0
    cut: int = 0


def predict_file(
    table: Table,
    predictor: Predictor,
    output: Path,
    *,
    skip: bool = False,
    resume: bool = False,
    progress: Callable[[int], object] = lambda done: None,
) -> Predicted:
    """Write a line of JSON for each row: its number and what the model says of it.

    The file appears whole or not at all; one that was there before stays until then. While a run
    goes on its lines stand in a folder beside it, ``.NAME.partial``.

    Args:
        skip: leave bad rows out, instead of stopping before any work.
        resume: go on with what an earlier run has left, and leave what this one cannot finish. The
            result is the same to the bit on the same machine.
        progress: called with the number of rows that are done.

    Raises:
        InputError: a bad row, or only such rows.
        OutputError: a file of another kind, or one that cannot be written; with ``resume`` what is
            there was begun with something else.
    """
    if output.suffix != ".jsonl":
        raise OutputError(f"expected an output of .jsonl, got {str(output)!r}")
    bad = {table.first + row: why for row, why in predictor.task.problems(table).items()}
    if bad and not skip:
        row, why = next(iter(bad.items()))
        raise InputError(
            f"row {row} of {table.name!r}: {why} ({len(bad)} bad rows in all); mend them or pass "
            "--on-error skip. Nothing was written"
        )
    if len(bad) == len(table):
        raise InputError(f"expected a row to predict in {table.name!r}, got bad ones only")
    facts = {
        "table": table.digest(), "model": weights_digest(predictor.model),
        "labels": predictor.task.labels, "max_length": predictor.max_length,
        "windows": predictor.windows, "skip": skip,
    }  # fmt: skip
    folder = output.with_name(f".{output.name}.partial")
    with _writing(output):
        folder.mkdir(exist_ok=True)
        lock = take_lock(folder / "lock", f"write {str(output)!r}")
        keep = resume
        try:
            begun = _earlier(folder, facts) if resume else _State()
            state = _predict(table, predictor, folder, facts, begun, bad, progress)
            (folder / "rows.jsonl").replace(output)
            keep = False
        finally:
            lock.release()
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
    return Predicted(state.rows, bad, state.cut, begun.rows)


def _predict(
    table: Table,
    predictor: Predictor,
    folder: Path,
    facts: dict[str, Any],
    state: _State,
    bad: dict[int, str],
    progress: Callable[[int], object],
) -> _State:
    with (folder / "rows.jsonl").open("r+b" if state.size else "wb") as file:
        file.truncate(state.size)  # what came behind the last part that counts
        file.seek(state.size)
        for index, part in enumerate(table.parts(_PART)):
            if index < state.parts:
                continue
            numbers = [part.first + i for i in range(len(part))]
            good = [i for i, number in enumerate(numbers) if number not in bad]
            cut = 0
            if good:
                _, described, cut = predictor(part.take(np.array(good)))
                for i, said in zip(good, described, strict=True):
                    line = json.dumps({"row": numbers[i], **said}, ensure_ascii=False)
                    file.write(line.encode("utf-8") + b"\n")
            to_disk(file)
            state = _State(index + 1, file.tell(), state.rows + len(good), state.cut + cut)
            write_json(folder / "run.json", {"facts": facts, "state": state})
            progress(state.rows)
    return state


def _earlier(folder: Path, facts: dict[str, Any]) -> _State:
    """How far an earlier run came with the same facts.

    Raises:
        OutputError: with others.
    """
    path, rows = folder / "run.json", folder / "rows.jsonl"
    if not path.exists() or not rows.exists():
        return _State()
    found = json.loads(path.read_text("utf-8"))
    other = [name for name, value in facts.items() if found["facts"].get(name) != value]
    state = _State(*found["state"])
    if other or rows.stat().st_size < state.size:
        raise OutputError(
            f"cannot go on with what is in {str(folder)!r}: another {' and '.join(other) or 'size'}"
            "; use what it was begun with, or start again without --resume"
        )
    return state


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {str(output)!r}: {error.strerror or error}; what was there before is as "
            "it was"
        ) from error
