"""Embeddings to files: .npy, .parquet, .jsonl and .csv (these two also .gz), whole or not at all.

While a run goes on, its vectors stand in a folder beside the file they are for, and on the disk
before the run counts them as done. The file itself is made at the end and put in its place in one
step, so that what was there before stays until then.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from types import TracebackType

import numpy as np

from .durable import take_lock, to_disk, write_json
from .errors import OutputError
from .reading import Row

__all__ = ["OUTPUT_KINDS", "VectorFile", "check_output"]

OUTPUT_KINDS = (".npy", ".parquet", ".jsonl", ".csv", ".jsonl.gz", ".csv.gz")
_GROUP = 4096  # rows of one parquet row group


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for kind in reversed(OUTPUT_KINDS) if name.endswith(kind)), None)


def check_output(path: Path, source: Path | None = None) -> None:
    """Raise now what writing to ``path`` would raise after the work.

    Args:
        path: the file to be written.
        source: the file that is read, which may not be the same.

    Raises:
        OutputError: another kind of file, no such folder, or not writable.
    """
    if _kind(path) is None:
        raise OutputError(f"expected an output of {', '.join(OUTPUT_KINDS)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise OutputError(f"expected an existing folder, got {str(path.parent)!r}; create it first")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError(f"expected a file that can be written, got {str(path)!r}")
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise OutputError(f"expected another file than the input, got {str(path)!r}")
    if _kind(path) == ".parquet":
        _pyarrow()


def _pyarrow():
    try:
        import pyarrow.parquet
    except ImportError:
        raise OutputError(
            "parquet needs pyarrow: pip install 'fastbert-triton[embed]', or write .npy or .jsonl"
        ) from None
    return pyarrow


class VectorFile:
    """Vectors that are written part by part to a file that appears whole or not at all.

    Use as a context manager: `append` the vectors, then `finish`. Leaving the block before that
    (Ctrl-C included) leaves the folder of the run for a later one that resumes, if this one may be
    resumed, and nothing otherwise. A process that is killed leaves it too. Its files::

        .NAME.partial/vectors.npy   the vectors so far
                      run.json      the facts of the run, and how many vectors are on the disk
                      lock          held while a process writes here

    Args:
        path: of `OUTPUT_KINDS`. A ``.npy`` is ``[N, E]``; the others have columns ``line``,
            ``text`` and ``embedding``. Always fp32.
        facts: what the vectors follow from; who resumes must have the same.
        num_rows: ``N``.
        size: ``E``.
        resume: go on with what an earlier run has left, and leave what this one cannot finish.

    Raises:
        OutputError: as `check_output`; other facts; another process writes to the file.
    """

    def __init__(
        self, path: Path, facts: dict[str, object], *, num_rows: int, size: int, resume: bool
    ):
        check_output(path)
        self._path, self._resume, self._size, self._num_rows = path, resume, size, num_rows
        # As they come back from the file.
        self._facts = json.loads(json.dumps({**facts, "rows": num_rows, "size": size}))
        self._folder = path.with_name(f".{path.name}.partial")
        self._vectors, self._run = self._folder / "vectors.npy", self._folder / "run.json"
        self._file = None
        self._finished = False
        self.done = 0  # vectors that are on the disk
        self.discarded = 0  # vectors of an unfinished run that was not resumed

    def __enter__(self) -> VectorFile:
        with ExitStack() as undo, self._writing():
            self._folder.mkdir(exist_ok=True)
            self._lock = take_lock(self._folder / "lock", f"write {str(self._path)!r}")
            undo.callback(self._leave)
            self._begin()
            undo.pop_all()
        return self

    def _begin(self) -> None:
        earlier = self._earlier()
        if earlier and self._resume:
            self._check_same(earlier["facts"])
            self.done = earlier["done"]
        elif earlier:
            self.discarded = earlier["done"]
        self._file = self._vectors.open("r+b" if self.done else "wb")
        shape = (self._num_rows, self._size)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        end = self._file.tell() + 4 * self._size * self.done
        if self._file.seek(0, os.SEEK_END) < end:
            raise OutputError(
                f"expected {self.done} vectors in {str(self._vectors)!r}, got fewer: it was "
                "changed. Start again without --resume"
            )
        self._file.seek(end)
        self._count(self.done)

    def _earlier(self) -> dict | None:
        """What an unfinished run has left."""
        if not self._vectors.exists():
            return None
        try:
            return json.loads(self._run.read_text("utf-8"))
        except (FileNotFoundError, ValueError):  # killed before it had counted anything
            return None

    def _check_same(self, facts: dict) -> None:
        names = dict.fromkeys([*facts, *self._facts])
        other = [
            f"{name} was {facts.get(name)!r} and is {self._facts.get(name)!r}"
            for name in names
            if facts.get(name) != self._facts.get(name)
        ]
        if other:
            raise OutputError(
                f"cannot go on with the unfinished run for {str(self._path)!r}: "
                f"{'; '.join(other)}. Use what it was begun with, or start again without --resume"
            )

    def append(self, vectors: np.ndarray) -> None:
        """Add ``[n, E]``; once this returns they survive whatever happens to the process."""
        assert vectors.shape[1:] == (self._size,), vectors.shape
        with self._writing():
            self._file.write(np.ascontiguousarray(vectors, dtype="<f4").data)
            to_disk(self._file)
            self._count(self.done + len(vectors))

    def _count(self, done: int) -> None:
        write_json(self._run, {"facts": self._facts, "done": done})
        self.done = done

    def finish(self, rows: Iterable[Row]) -> None:
        """Make the file of the vectors and of the ``N`` rows they belong to."""
        assert self.done == self._num_rows, (self.done, self._num_rows)
        with self._writing():
            self._file.close()
            whole = self._vectors
            if _kind(self._path) != ".npy":
                whole = self._folder / "whole"
                with whole.open("wb") as file:
                    pairs = zip(rows, np.load(self._vectors, mmap_mode="r"), strict=True)
                    _write(file, _kind(self._path), pairs, self._size)
                    to_disk(file)
            whole.replace(self._path)
        self._finished = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # the disk is full: there is nothing to save in this file
                self._file.close()
        if not self._finished and self._resume and self._run.exists():
            self._lock.release()
            return
        for file in (self._run, self._vectors):  # the count may not outlive what it counts
            file.unlink(missing_ok=True)
        self._lock.release()
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            left = (
                f"the first {self.done} vectors are kept for a run with --resume"
                if self._resume and self.done
                else "nothing was left behind"
            )
            raise OutputError(
                f"cannot write {str(self._path)!r}: {error.strerror or error}; {left}, "
                "and a file that was there before is as it was"
            ) from error


def _write(file, kind: str, pairs: Iterable[tuple[Row, np.ndarray]], size: int) -> None:
    if kind == ".parquet":
        _write_parquet(file, pairs, size)
    elif kind.endswith(".gz"):
        # No name and no time in the header: the same vectors are the same bytes.
        with gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as packed:
            _write_text(packed, kind, pairs, size)
    else:
        _write_text(file, kind, pairs, size)


def _write_text(file, kind: str, pairs: Iterable[tuple[Row, np.ndarray]], size: int) -> None:
    numbers = "[" + ", ".join(["%.9g"] * size) + "]"  # nine digits tell any two fp32 apart
    text = io.TextIOWrapper(file, "utf-8", newline="")
    if kind.startswith(".csv"):
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["line", "text", "embedding"])
        for row, vector in pairs:
            writer.writerow([row.line, row.text, numbers % tuple(vector.tolist())])
    else:
        for row, vector in pairs:
            embedding = numbers % tuple(vector.tolist())
            quoted = json.dumps(row.text, ensure_ascii=False)
            text.write(f'{{"line": {row.line}, "text": {quoted}, "embedding": {embedding}}}\n')
    text.flush()
    text.detach()


def _write_parquet(file, pairs: Iterable[tuple[Row, np.ndarray]], size: int) -> None:
    pa = _pyarrow()
    schema = pa.schema(
        [
            ("line", pa.int64()),
            ("text", pa.string()),
            ("embedding", pa.list_(pa.float32(), size)),
        ]
    )
    pairs = iter(pairs)
    with pa.parquet.ParquetWriter(file, schema) as writer:
        while group := list(islice(pairs, _GROUP)):
            rows, vectors = zip(*group, strict=True)
            columns = [
                pa.array([row.line for row in rows], pa.int64()),
                pa.array([row.text for row in rows], pa.string()),
                pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(vectors)), size),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
