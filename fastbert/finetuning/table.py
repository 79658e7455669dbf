"""Rows with texts and labels: files, folders of `datasets`, and their splits.

`datasets` reads them and says of which type a column is; what it would take for a missing value in
a CSV file ("NA", "null", nothing) stays the text that it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from ..tasks.errors import InputError

__all__ = ["Splits", "Table", "read_table", "split_off"]

_KINDS = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
}
_CONLL = (".conll", ".iob", ".bio")


class Table:
    """Rows in memory-mapped columns.

    Args:
        data: the rows.
        name: what messages call it.
        first: the number of its first row.
    """

    def __init__(self, data: datasets.Dataset, name: str, first: int = 1):
        self.data, self.name, self.first = data, name, first

    def __len__(self) -> int:
        return len(self.data)

    @property
    def columns(self) -> list[str]:
        """Their names."""
        return self.data.column_names

    def column(self, name: str) -> list[Any]:
        """All values of one."""
        return self.data[name][:]

    def rows(self, names: Sequence[str]) -> list[tuple[Any, ...]]:
        """Of some columns."""
        return list(zip(*(self.column(name) for name in names), strict=True))

    def take(self, indices: np.ndarray) -> Table:
        """Some rows, in this order."""
        return Table(self.data.select(indices), self.name)

    def parts(self, size: int) -> Iterator[Table]:
        """The rows, so many at a time."""
        for start in range(0, len(self), size):
            rows = range(start, min(start + size, len(self)))
            yield Table(self.data.select(rows), self.name, self.first + start)

    def digest(self) -> str:
        """BLAKE2b of names and values."""
        found = hashlib.blake2b(digest_size=16)
        for name in sorted(self.columns):
            found.update(repr((name, self.column(name))).encode("utf-8", "surrogatepass"))
        return found.hexdigest()


class Splits(NamedTuple):
    """What is trained on, what the best model is chosen by, and what says how good it is."""

    train: Table
    dev: Table
    test: Table | None


def read_table(path: Path | str, cache_dir: Path | str | None = None) -> Table:
    """The rows of a file (.csv, .tsv, .jsonl, each also .gz; .json, .parquet; .conll) or of a
    folder that ``datasets.Dataset.save_to_disk`` made.

    Raises:
        InputError: no such file, one that cannot be read, or without rows.
    """
    path, name = Path(path), str(path)
    if not path.exists():
        raise InputError(f"expected a file or a folder of datasets, got {name!r}, which is not")
    try:
        data = _read(path, cache_dir)
    except InputError:
        raise
    except Exception as error:  # whatever datasets and what it reads with may raise
        cause = error.__cause__ or error
        if "no data" in str(cause):  # what datasets says of a header without rows
            raise InputError(f"expected at least one row in {name!r}, got none") from error
        raise InputError(
            f"expected a table in {name!r}, got one that cannot be read: "
            f"{(str(cause).strip() or type(cause).__name__).splitlines()[0]}"
        ) from error
    if not len(data):
        raise InputError(f"expected at least one row in {name!r}, got none")
    return Table(data, name)


def _read(path: Path, cache_dir: Path | str | None) -> datasets.Dataset:
    if path.is_dir():
        data = datasets.load_from_disk(str(path))
        if not isinstance(data, datasets.Dataset):
            raise InputError(
                f"expected the folder of one table, got {str(path)!r} with {', '.join(data)}; "
                "name one of the folders in it"
            )
        return data
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind in _CONLL:
        return _read_conll(path)
    if kind not in _KINDS:
        raise InputError(f"expected a file of {', '.join([*_KINDS, *_CONLL])}, got {str(path)!r}")
    if kind == ".json" and (squad := _squad_rows(path)) is not None:
        return datasets.Dataset.from_list(squad)
    reader, options = _KINDS[kind]
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(
            reader, data_files=str(path), split="train", cache_dir=cache_dir and str(cache_dir),
            **options,
        )  # fmt: skip
    finally:
        if shown:
            datasets.enable_progress_bars()


def _squad_rows(path: Path) -> list[dict[str, Any]] | None:
    """The questions of a file as SQuAD has them, v1 or v2; None for another one."""
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        return None
    return [
        {
            "id": question.get("id"),
            "question": question["question"],
            "context": paragraph["context"],
            "answers": {
                "text": [answer["text"] for answer in question.get("answers", [])],
                "answer_start": [answer["answer_start"] for answer in question.get("answers", [])],
            },
        }
        for article in content["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def _read_conll(path: Path) -> datasets.Dataset:
    """A token a line, its tag last, a blank line behind each sentence (CoNLL 2003)."""
    rows: dict[str, list[list[str]]] = {"tokens": [], "tags": []}
    tokens: list[str] = []
    tags: list[str] = []
    lines = path.read_text("utf-8").split("\n")
    for number, line in enumerate([*lines, ""], 1):
        cells = line.split()
        if cells and cells[0] != "-DOCSTART-":
            if len(cells) == 1:
                raise InputError(
                    f"expected a token and its tag on line {number} of {str(path)!r}, got {line!r}"
                )
            tokens.append(cells[0])
            tags.append(cells[-1])
        elif tokens:
            rows["tokens"].append(tokens)
            rows["tags"].append(tags)
            tokens, tags = [], []
    return datasets.Dataset.from_dict(rows)


def split_off(table: Table, share: float, seed: int) -> tuple[Table, Table]:
    """A share of the rows, chosen by the seed, and the others; both in their old order.

    Raises:
        InputError: too few rows for one on each side.
    """
    count = max(round(share * len(table)), 1)
    if count >= len(table):
        raise InputError(
            f"expected rows to train on and rows to split off in {table.name!r}, got "
            f"{len(table)} altogether; give a file to evaluate on"
        )
    chosen = np.zeros(len(table), bool)
    chosen[np.random.default_rng(seed).permutation(len(table))[:count]] = True
    return table.take(np.flatnonzero(~chosen)), table.take(np.flatnonzero(chosen))
