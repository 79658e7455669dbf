"""Texts from files: .txt, .csv, .tsv and .jsonl (each also .gz), .parquet, and standard input.

One bad record never ends the reading: it comes as a `BadRow` with its line and a reason, and the
next row follows. No record is held in memory beyond `MAX_RECORD` characters.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

from .errors import InputError

__all__ = ["KINDS", "LISTED", "MAX_RECORD", "BadRow", "Row", "Scan", "TextFile"]

KINDS = ("txt", "csv", "tsv", "jsonl", "parquet")
MAX_RECORD = 16 * 2**20  # characters: a longer line, or a longer quoted field, is a bad row
_LINE = 64  # what holding a line costs beside its characters, for fields of very many lines
LISTED = 20  # bad rows that are kept to be shown one by one
_DIALECTS = {"csv": csv.excel, "tsv": csv.excel_tab}
# What JSON calls the types that json.loads makes of it here.
_JSON_NAMES = {bool: "a boolean", dict: "an object", float: "a number", int: "a number",
               list: "an array", tuple: "an object", type(None): "null"}  # fmt: skip


class Row(NamedTuple):
    """A text and the line that it begins on (from 1; of parquet the row)."""

    line: int
    text: str


class BadRow(NamedTuple):
    """A line that holds no text, and why; ``empty`` where that is all that is wrong with it."""

    line: int
    reason: str
    empty: bool = False


class Scan(NamedTuple):
    """What reading a file through has found.

    Attributes:
        num_rows, num_bad: texts, and lines that hold none.
        bad: the first `LISTED` of these.
        digest: BLAKE2b of the bytes of the file.
        stamp: size in bytes and time of the last change in ns; another one is another file.
    """

    num_rows: int
    num_bad: int
    bad: list[BadRow]
    digest: str
    stamp: tuple[int, int]


class TextFile:
    """A file of texts that can be read any number of times.

    Args:
        path: the file; ``-`` is standard input, which is copied to a temporary file first.
        column: the column, or key, that holds the text, by default ``text``; a ``.txt`` has none.
        kind: one of `KINDS`; by default what the name ends in (``.gz`` is looked through), and
            ``txt`` for standard input.

    Raises:
        InputError: a kind that is not known or does not go with ``column``, or no such file.
    """

    def __init__(self, path: Path | str, column: str | None = None, kind: str | None = None):
        self.path = Path(path)
        self.is_stdin = str(path) == "-"
        self.name = "standard input" if self.is_stdin else str(path)
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        self._gzipped = suffixes[-1:] == [".gz"]
        named = (suffixes[-2:-1] if self._gzipped else suffixes[-1:]) or [""]
        self.kind = kind or ("txt" if self.is_stdin else named[0].removeprefix("."))
        if self.kind not in KINDS or (self._gzipped and self.kind == "parquet"):
            raise InputError(
                f"expected a file of .{', .'.join(KINDS)} (all but parquet also with .gz), "
                f"got {str(path)!r}"
            )
        if self.kind == "txt" and column is not None:
            raise InputError(
                f"expected no column for a .txt, whose lines are the texts, got {column!r}"
            )
        self.column = "the line" if self.kind == "txt" else column or "text"
        if self.path.is_dir():
            raise InputError(f"expected a file, got {self.name!r}, which is a folder")
        self._spooled = _spool(sys.stdin.buffer) if self.is_stdin else None
        if self.is_stdin and kind is None:
            self._refuse_json()

    def _refuse_json(self) -> None:
        with self._open() as file:
            if file.read(64).lstrip().startswith((b'{"', b'{ "')):
                raise InputError(
                    "expected a text on every line of standard input, got what looks like JSON; "
                    "say --format jsonl, or --format txt if these are the texts"
                )

    @property
    def stamp(self) -> tuple[int, int]:
        """As in `Scan`."""
        with self._readable():
            status = os.stat(self._spooled.fileno() if self._spooled else self.path)
        return status.st_size, status.st_mtime_ns

    def scan(self) -> Scan:
        """Read the file through: how many texts, which lines hold none.

        Raises:
            InputError: as `rows`, or no text at all.
        """
        stamp, counts, bad = self.stamp, {Row: 0, BadRow: 0}, []
        for row in self.rows():
            counts[type(row)] += 1
            if isinstance(row, BadRow) and len(bad) < LISTED:
                bad.append(row)
        if counts[Row] == 0 and not bad:
            raise InputError(f"expected at least one text in {self.name!r}, got none")
        return Scan(counts[Row], counts[BadRow], bad, self.digest(), stamp)

    def digest(self) -> str:
        """BLAKE2b of the bytes of the file."""
        found = hashlib.blake2b(digest_size=16)
        with self._readable(), self._open_raw() as file:
            while block := file.read(1 << 20):
                found.update(block)
        return found.hexdigest()

    def rows(self) -> Iterator[Row | BadRow]:
        """The texts, one by one, and what is not one.

        Raises:
            InputError: the file cannot be opened, or has no such column, or two.
        """
        line = 0
        try:
            with self._readable():
                for row in self._read():
                    line = row.line
                    yield row
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield BadRow(line + 1, f"the compressed file is damaged from here on ({error})")

    def _read(self) -> Iterator[Row | BadRow]:
        if self.kind == "parquet":
            with self._open_raw() as file:
                yield from _read_parquet(file, self)
            return
        with self._open() as raw:
            if raw.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise InputError(
                    f"expected UTF-8 in {self.name!r}, got UTF-16; convert it first, for instance "
                    "with iconv -f utf-16 -t utf-8"
                )
            # What is not UTF-8 passes as surrogates and is found in the row that holds it. Only CSV
            # has line ends that belong to a text.
            newline = "" if self.kind in _DIALECTS else None
            with io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline) as file:
                yield from _READERS[self.kind](file, self)

    def _open_raw(self) -> BinaryIO:
        if self._spooled is None:
            return self.path.open("rb")
        self._spooled.seek(0)
        return os.fdopen(os.dup(self._spooled.fileno()), "rb")

    def _open(self) -> io.BufferedReader:
        return gzip.open(self.path, "rb") if self._gzipped else self._open_raw()

    def _readable(self) -> _Readable:
        return _Readable(self.name)


class _Readable:
    """Makes a failure to open or to read what this module raises for it."""

    def __init__(self, name: str):
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            raise InputError(
                f"expected a readable file, got {self._name!r}: {error.strerror or error}"
            ) from error


def _spool(stream: BinaryIO) -> BinaryIO:
    """A copy that can be read again; it has no name, so that no way to end leaves it behind."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the TextFile
    shutil.copyfileobj(stream, copy)
    copy.flush()
    return copy


def _checked(line: int, text: object, column: str) -> Row | BadRow:
    if not isinstance(text, str):
        found = _JSON_NAMES.get(type(text), type(text).__name__)
        return BadRow(line, f"expected a text in {column!r}, got {found}")
    if not text or text.isspace():
        return BadRow(line, f"expected a text in {column!r}, got an empty one", empty=True)
    reason = _not_unicode(text)
    return BadRow(line, reason) if reason else Row(line, text)


def _not_unicode(text: str) -> str | None:
    """Why a text cannot be encoded, if it cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # what surrogateescape makes of a byte
            return f"not UTF-8 (byte 0x{code - 0xDC00:02x} at character {error.start})"
        return f"half a character (the surrogate U+{code:04X} alone at character {error.start})"
    return None


def _lines(file: TextIO) -> Iterator[tuple[int, str | None]]:
    """Lines with their ends and numbers; None for one that is too long."""
    number = 0
    while line := file.readline(MAX_RECORD):
        number += 1
        if len(line) == MAX_RECORD and line[-1] not in "\r\n":
            while (rest := file.readline(MAX_RECORD)) and rest[-1] not in "\r\n":
                pass
            yield number, None
        else:
            yield number, line


def _too_long(line: int) -> BadRow:
    return BadRow(line, f"longer than {MAX_RECORD} characters")


class _Blanks:
    """Blank lines one after the other: bad rows, unless nothing comes after them."""

    def __init__(self):
        self._first = self._count = 0

    def hold(self, line: int) -> None:
        self._first = self._first if self._count else line
        self._count += 1

    def release(self) -> Iterator[BadRow]:
        for line in range(self._first, self._first + self._count):
            yield BadRow(line, "a blank line", empty=True)
        self._count = 0


def _read_txt(file: TextIO, source: TextFile) -> Iterator[Row | BadRow]:
    for number, line in _lines(file):
        if line is None:
            yield _too_long(number)
        else:
            yield _checked(number, line.removesuffix("\n"), source.column)


def _read_jsonl(file: TextIO, source: TextFile) -> Iterator[Row | BadRow]:
    blanks = _Blanks()
    for number, line in _lines(file):
        if line is not None and line.isspace():
            blanks.hold(number)
            continue
        yield from blanks.release()
        if line is None:
            yield _too_long(number)
        else:
            yield _from_json(number, line, source.column)


def _from_json(number: int, line: str, column: str) -> Row | BadRow:
    reason = _not_unicode(line)
    if reason:
        return BadRow(number, reason)
    try:
        # Objects as tuples of pairs: a key that comes twice is seen, and arrays are told apart.
        value = json.loads(line, object_pairs_hook=tuple)
    except ValueError as error:
        return BadRow(number, f"not JSON ({error})")
    except RecursionError:
        return BadRow(number, "JSON that is nested too deeply")
    found = [v for k, v in value if k == column] if isinstance(value, tuple) else []
    if len(found) != 1:
        return BadRow(number, f"expected an object with {column!r}" + (" once" if found else ""))
    return _checked(number, found[0], column)


class _TooLong(Exception):
    pass


class _Record:
    """The lines that csv.reader has taken for the record it is in, to go back to the second."""

    def __init__(self, lines: Iterator[tuple[int, str | None]]):
        self._lines, self._again = lines, deque()
        self._taken: list[tuple[int, str | None]] = []
        self._size = 0

    def __iter__(self) -> _Record:
        return self

    def __next__(self) -> str:
        number, line = self._again.popleft() if self._again else next(self._lines)
        self._taken.append((number, line))
        self._size += len(line or "") + _LINE
        if line is None or self._size > MAX_RECORD:
            raise _TooLong
        return line

    @property
    def line(self) -> int:
        """Where the record begins."""
        return self._taken[0][0]

    def begin(self) -> None:
        self._taken.clear()
        self._size = 0

    def give_back(self) -> None:
        """All lines but the first will be read again."""
        self._again.extendleft(reversed(self._taken[1:]))


def _csv_records(file: TextIO, kind: str) -> Iterator[tuple[int, list[str] | str]]:
    """Records by the line they begin on, as cells or as the reason why they are none.

    A record that breaks the rules of quoting (Python's strict mode, RFC 4180) is bad by its first
    line; reading goes on with the line after it, so that a quote which never closes costs a line.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD))  # of the whole process
    record = _Record(_lines(file))
    reader = csv.reader(record, _DIALECTS[kind], strict=True)
    while True:
        record.begin()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except (_TooLong, csv.Error) as error:
            if isinstance(error, _TooLong):
                reason = _too_long(record.line).reason + ", or a quote that never closes"
            elif "end of data" in str(error):
                reason = "a quote that never closes"
            else:
                reason = f"not {kind.upper()} ({error})"
            yield record.line, reason
            record.give_back()
            reader = csv.reader(record, _DIALECTS[kind], strict=True)
        else:
            yield record.line, cells


def _read_csv(file: TextIO, source: TextFile) -> Iterator[Row | BadRow]:
    records = _csv_records(file, source.kind)
    _, header = next(records, (0, []))
    if isinstance(header, str):
        raise InputError(f"expected the names of columns on line 1 of {source.name!r}: {header}")
    index = _the_only(header, source)
    blanks = _Blanks()
    for line, cells in records:
        if not cells:
            blanks.hold(line)
            continue
        yield from blanks.release()
        if isinstance(cells, str):
            yield BadRow(line, cells)
        elif len(cells) != len(header):
            yield BadRow(line, f"expected {len(header)} cells, got {len(cells)}")
        else:
            yield _checked(line, cells[index], source.column)


def _the_only(names: list[str], source: TextFile) -> int:
    """Which column it is."""
    count = names.count(source.column)
    if count != 1:
        found = f"{count} of that name in {names}" if count else names or "an empty file"
        raise InputError(
            f"expected a column {source.column!r} in {source.name!r}, got {found}; "
            + ("rename one" if count else "name it with --column")
        )
    return names.index(source.column)


def _read_parquet(file: BinaryIO, source: TextFile) -> Iterator[Row | BadRow]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            "parquet needs pyarrow: pip install 'fastbert-triton[embed]', or use .jsonl"
        ) from None
    try:
        # By default a whole group is read at once, which may be the whole file.
        table = pyarrow.parquet.ParquetFile(
            file, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
        )
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"expected a parquet file, got {source.name!r}: {error}") from error
    _the_only(table.schema_arrow.names, source)
    line = 0
    for group in range(table.num_row_groups):
        end = line + table.metadata.row_group(group).num_rows
        reason = "it is not there"
        batches = table.iter_batches(1024, row_groups=[group], columns=[source.column])
        try:
            for batch in batches:
                for text in _parquet_texts(batch.column(0)):
                    line += 1
                    if isinstance(text, UnicodeDecodeError):
                        yield BadRow(line, f"not UTF-8 ({text.reason} at byte {text.start})")
                    else:
                        yield _checked(line, text, source.column)
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
        while line < end:
            line += 1
            yield BadRow(line, f"in a damaged part of the file ({reason})")


def _parquet_texts(column) -> Iterator[object]:
    """Values of a pyarrow array; text is decoded one by one, since a bad one spoils only itself."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not any(
        test(column.type)
        for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    ):
        yield from column.to_pylist()
        return
    for value in column.cast(pa.large_binary()).to_pylist():
        try:
            yield value if value is None else value.decode("utf-8")
        except UnicodeDecodeError as error:
            yield error


_READERS: dict[str, Callable[[TextIO, TextFile], Iterator[Row | BadRow]]] = {
    "txt": _read_txt,
    "csv": _read_csv,
    "tsv": _read_csv,
    "jsonl": _read_jsonl,
}
