"""``fastbert embed``: a file of texts to a file of embeddings."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..tasks.errors import InputError
from .options import AllowPickle, Device, Dtype, model_source

__all__ = ["command"]

_SHOWN = 20  # bad rows that are listed one by one
_WINDOW = 4096  # texts that are held, sorted by length and written together


class OnError(str, Enum):
    """What to do about a row without a text."""

    stop = "stop"
    skip = "skip"


def command(
    file: Annotated[
        Path, typer.Argument(help="Texts: .txt (a line each), .csv, .jsonl, .parquet.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Embeddings in fp32: .parquet or .npy.")
    ],
    model: Annotated[
        str | None, typer.Option(help="A model folder or hub name; default: the MiniLM package.")
    ] = None,
    column: Annotated[str, typer.Option(help="Column or key of the text.")] = "text",
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Real tokens in one forward pass.")
    ] = 16384,
    max_length: Annotated[int | None, typer.Option(help="Cut texts after so many tokens.")] = None,
    on_error: Annotated[
        OnError, typer.Option(help="A bad row: stop before any work, or leave it out.")
    ] = OnError.stop,
    allow_pickle: AllowPickle = False,
) -> None:
    """Embed every text of FILE.

    The whole file is read once before any work, so that a bad row stops the run while nothing is
    lost (or, with --on-error skip, is listed and left out). OUTPUT appears whole or not at all:
    until the end it is a temporary file beside it, and a file that was there before stays until
    then.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from ..tasks.embed import Embedder
    from ..tasks.loading import resolve_device, resolve_dtype
    from ..tasks.rows import BadRow, EmbeddingWriter, Row, check_output, read_rows

    console = Console(stderr=True)
    check_output(output)
    num_rows, bad = 0, []
    for row in read_rows(file, column):
        if isinstance(row, BadRow):
            bad.append(row)
        else:
            num_rows += 1
    for row in bad[:_SHOWN]:
        console.print(f"{file}, line {row.line}: {row.reason}", markup=False, highlight=False)
    if len(bad) > _SHOWN:
        console.print(f"... and {len(bad) - _SHOWN} more bad rows")
    if bad and on_error is OnError.stop:
        raise InputError(
            f"expected a text on every line of {str(file)!r}, got {len(bad)} bad of "
            f"{num_rows + len(bad)} rows (listed above); mend them or pass --on-error skip. "
            "Nothing was written"
        )
    if num_rows == 0:
        raise InputError(f"expected at least one text in {str(file)!r}, got none")

    where = resolve_device(device)
    embedder = Embedder.load(
        model_source(model),
        device=where,
        dtype=resolve_dtype(dtype, where),
        max_length=max_length,
        allow_pickle=allow_pickle,
    )
    columns = (
        TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    progress = Progress(*columns, console=console, disable=not console.is_terminal)
    with EmbeddingWriter(output, num_rows=num_rows, size=embedder.size) as writer, progress:
        task = progress.add_task("embedding", total=num_rows)
        held: list[Row] = []

        def flush() -> None:
            vectors = embedder.embed([r.text for r in held], batch_tokens=batch_tokens)
            writer.write(held, vectors)
            progress.advance(task, len(held))
            held.clear()

        for row in read_rows(file, column):
            if isinstance(row, Row):
                held.append(row)
                if len(held) == _WINDOW:
                    flush()
        if held:
            flush()
    skipped = f", {len(bad)} bad rows left out" if bad else ""
    typer.echo(f"{num_rows} embeddings of size {embedder.size} in {output}{skipped}")
