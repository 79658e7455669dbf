"""Files of rows: texts in from txt, csv, jsonl and parquet, embeddings out to parquet and npy."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from .errors import InputError, OutputError

__all__ = ["INPUT_KINDS", "OUTPUT_KINDS", "BadRow", "EmbeddingWriter", "Row", "read_rows"]

INPUT_KINDS = (".txt", ".csv", ".jsonl", ".parquet")
OUTPUT_KINDS = (".parquet", ".npy")


class Row(NamedTuple):
    """A text and the line (from 1; of parquet the row) that it stands on."""

    line: int
    text: str


class BadRow(NamedTuple):
    """A line that holds no text, and why."""

    line: int
    reason: str


def read_rows(path: Path, column: str = "text") -> Iterator[Row | BadRow]:
    """The texts of a file, one by one; bad rows come as `BadRow`, for the caller to decide about.

    Args:
        path: ``.txt`` (a text a line), ``.csv`` (with a header), ``.jsonl`` or ``.parquet``.
        column: the column, or key, that holds the text.

    Raises:
        InputError: the file cannot be read at all, or has no such column.
    """
    kind = path.suffix.lower()
    if kind not in INPUT_KINDS:
        raise InputError(f"expected a file of {', '.join(INPUT_KINDS)}, got {str(path)!r}")
    readers = {
        ".txt": _read_txt,
        ".csv": _read_csv,
        ".jsonl": _read_jsonl,
        ".parquet": _read_parquet,
    }
    try:
        yield from readers[kind](path, column)
    except OSError as error:
        raise InputError(
            f"expected a readable file, got {str(path)!r}: {error.strerror}"
        ) from error


def _lines(path: Path) -> Iterator[tuple[int, str | BadRow]]:
    """Lines without their ends, undecodable ones as bad rows, no byte order mark."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            try:
                yield number, raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield number, BadRow(number, f"not UTF-8 ({error.reason} at byte {error.start})")


def _checked(line: int, text: object, column: str) -> Row | BadRow:
    if not isinstance(text, str):
        return BadRow(line, f"expected a text in {column!r}, got {type(text).__name__}")
    if not text.strip():
        return BadRow(line, f"expected a text in {column!r}, got an empty one")
    return Row(line, text)


def _read_txt(path: Path, column: str) -> Iterator[Row | BadRow]:
    for number, line in _lines(path):
        yield line if isinstance(line, BadRow) else _checked(number, line, "the line")


def _read_jsonl(path: Path, column: str) -> Iterator[Row | BadRow]:
    for number, line in _lines(path):
        if isinstance(line, BadRow):
            yield line
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            yield BadRow(number, f"not JSON ({error})")
            continue
        if not isinstance(value, dict) or column not in value:
            yield BadRow(number, f"expected an object with {column!r}")
        else:
            yield _checked(number, value[column], column)


def _read_csv(path: Path, column: str) -> Iterator[Row | BadRow]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, None)
            if header is None or column not in header:
                raise InputError(
                    f"expected a column {column!r} in {str(path)!r}, got "
                    f"{header or 'an empty file'}; name it with --column"
                )
            index = header.index(column)
            for cells in reader:
                line = reader.line_num
                if len(cells) != len(header):
                    yield BadRow(line, f"expected {len(header)} cells, got {len(cells)}")
                elif any("\udc80" <= character <= "\udcff" for character in cells[index]):
                    yield BadRow(line, "not UTF-8")
                else:
                    yield _checked(line, cells[index], column)
        except csv.Error as error:
            yield BadRow(reader.line_num, f"not CSV ({error})")


def _read_parquet(path: Path, column: str) -> Iterator[Row | BadRow]:
    parquet = _pyarrow_parquet()
    from pyarrow import ArrowException

    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise InputError(
                    f"expected a column {column!r} in {str(path)!r}, got "
                    f"{file.schema_arrow.names}; name it with --column"
                )
            line = 0
            for batch in file.iter_batches(columns=[column]):
                for text in batch.column(0).to_pylist():
                    line += 1
                    yield _checked(line, text, column)
    except ArrowException as error:
        raise InputError(f"expected a parquet file, got {str(path)!r}: {error}") from error


def _pyarrow_parquet():
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            "parquet needs pyarrow: pip install pyarrow, or use .jsonl in and .npy out"
        ) from None
    return pyarrow.parquet


class EmbeddingWriter:
    """Writes embeddings to a file that appears whole or not at all.

    Use as a context manager. Everything goes to a temporary file beside the target; leaving the
    block normally makes it durable and puts it in the target's place in one step, leaving it by an
    exception (Ctrl-C included) removes it, so that a target that was there before stays as it was.

    Args:
        path: ``.parquet`` (columns line, text, embedding) or ``.npy`` (``[N, E]``), fp32.
        num_rows: how many rows will come.
        size: ``E``.

    Raises:
        OutputError: another kind of file, no such folder, no room on the disk.
    """

    def __init__(self, path: Path, *, num_rows: int, size: int):
        check_output(path)
        self._path, self._num_rows, self._size, self._written = path, num_rows, size, 0
        self._parquet = None

    def __enter__(self) -> EmbeddingWriter:
        with _as_output_error(self._path):
            handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
            self._temporary = Path(name)
            self._file = os.fdopen(handle, "wb")
            if self._path.suffix.lower() == ".npy":
                shape = (self._num_rows, self._size)
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(self._file, header)
            else:
                import pyarrow as pa

                self._schema = pa.schema(
                    [
                        ("line", pa.int64()),
                        ("text", pa.string()),
                        ("embedding", pa.list_(pa.float32(), self._size)),
                    ]
                )
                self._parquet = _pyarrow_parquet().ParquetWriter(self._file, self._schema)
        return self

    def write(self, rows: list[Row], embeddings: np.ndarray) -> None:
        """Append rows with their embeddings ``[len(rows), E]``."""
        assert embeddings.shape == (len(rows), self._size), embeddings.shape
        embeddings = np.ascontiguousarray(embeddings, dtype="<f4")
        with _as_output_error(self._path):
            if self._parquet is None:
                self._file.write(embeddings.data)
            else:
                import pyarrow as pa

                values = pa.array(embeddings.reshape(-1))
                columns = [
                    pa.array([row.line for row in rows], pa.int64()),
                    pa.array([row.text for row in rows], pa.string()),
                    pa.FixedSizeListArray.from_arrays(values, self._size),
                ]
                self._parquet.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        self._written += len(rows)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                assert self._written == self._num_rows, (self._written, self._num_rows)
                with _as_output_error(self._path):
                    if self._parquet is not None:
                        self._parquet.close()
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._file.close()
                    self._temporary.chmod(0o666 & ~_umask())
                    os.replace(self._temporary, self._path)
        finally:
            if self._temporary.exists():
                _quietly(self._file.close)
                self._temporary.unlink()


def check_output(path: Path) -> None:
    """Raise now what writing to ``path`` would raise after the work.

    Raises:
        OutputError: another kind of file, no such folder, or not writable.
    """
    if path.suffix.lower() not in OUTPUT_KINDS:
        raise OutputError(f"expected an output of {', '.join(OUTPUT_KINDS)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise OutputError(f"expected an existing folder, got {str(path.parent)!r}; create it first")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError(f"expected a file that can be written, got {str(path)!r}")
    if path.suffix.lower() == ".parquet":
        _pyarrow_parquet()


class _as_output_error:
    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, OSError):
            raise OutputError(
                f"cannot write {str(self._path)!r}: {error.strerror or error}; "
                "nothing was left behind, and a file that was there before is as it was"
            ) from error


def _quietly(function) -> None:
    try:
        function()
    except OSError:  # the disk is full; there is nothing to save in this file
        return


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
