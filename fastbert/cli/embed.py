"""``fastbert embed``: a file of texts to a file of embeddings."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..tasks.errors import InputError
from .options import (
    AllowPickle,
    Device,
    Dtype,
    Long,
    LongText,
    OnBadRow,
    OnError,
    Resume,
    model_source,
)

__all__ = ["command"]


class Format(str, Enum):
    """`fastbert.tasks.reading.KINDS`, here as well so that ``--help`` needs no import of it."""

    txt = "txt"
    csv = "csv"
    tsv = "tsv"
    jsonl = "jsonl"
    parquet = "parquet"


def command(
    file: Annotated[
        Path,
        typer.Argument(
            help="Texts: .txt (a line each), .csv, .tsv, .jsonl (these also .gz), .parquet, "
            "or - for standard input."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Embeddings in fp32: .parquet, .npy, .jsonl, .csv (the last two also .gz).",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="A sentence-transformers or transformers model, folder or hub name; "
            "default: the MiniLM package."
        ),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Column or key of the text; default: text.")
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option(help="Of FILE; default: what its name says, txt for standard input."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Put before every text, in place of the model's default.")
    ] = None,
    prompt_name: Annotated[str | None, typer.Option(help="One of the model's prompts.")] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Scale to length 1, whatever the model does.")
    ] = False,
    truncate_dim: Annotated[
        int | None, typer.Option(min=1, help="Keep so many values of each embedding.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    int8: Annotated[
        bool,
        typer.Option("--int8", help="On a CPU: products in int8, faster, with other vectors."),
    ] = False,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Real tokens in one forward pass.")
    ] = 16384,
    max_length: Annotated[
        int | None, typer.Option(help="Of a text or window; default: what the model says.")
    ] = None,
    long: Long = LongText.cut,
    on_error: OnBadRow = OnError.stop,
    resume: Resume = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Embed every text of FILE, as SentenceTransformer(MODEL).encode would.

    The whole file is read once before any work, so that a bad row stops the run while nothing is
    lost (or, with --on-error skip, is listed and left out). OUTPUT appears whole or not at all, and
    a file that was there before stays until then.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from ..tasks.reading import Scan, TextFile
    from ..tasks.writing import check_output

    console = Console(stderr=True)
    texts = TextFile(file, column, format and format.value)
    check_output(output, None if texts.is_stdin else file)
    if texts.is_stdin and format is None:
        typer.echo("standard input: a text on every line (--format says otherwise)", err=True)
    scan: Scan = texts.scan()
    for row in scan.bad:
        typer.echo(f"{texts.name}, line {row.line}: {row.reason}", err=True)
    if scan.num_bad > len(scan.bad):
        typer.echo(f"... and {scan.num_bad - len(scan.bad)} more bad rows", err=True)
    if scan.num_bad and on_error is OnError.stop:
        raise InputError(
            f"expected a text on every line of {texts.name!r}, got {scan.num_bad} bad of "
            f"{scan.num_rows + scan.num_bad} rows (listed above); mend them or pass "
            "--on-error skip. Nothing was written"
        )

    from ..tasks.embed import Embedder
    from ..tasks.embed_file import embed_file
    from ..tasks.loading import resolve_device, resolve_dtype

    where, source = resolve_device(device), model_source(model)
    embedder = Embedder.load(
        source,
        device=where,
        dtype=resolve_dtype(dtype, where),
        allow_pickle=allow_pickle,
        int8=int8,
        max_length=max_length,
        windows=long is LongText.windows,
        prompt=prompt,
        prompt_name=prompt_name,
        normalize=normalize,
        truncate_dim=truncate_dim,
    )
    if embedder.is_plain:
        typer.echo(
            f"{source} is not a sentence-transformers model: mean pooling, as it would do", err=True
        )
    columns = (
        TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("embedding", total=scan.num_rows)
        done = embed_file(
            texts,
            output,
            embedder,
            scan=scan,
            batch_tokens=batch_tokens,
            resume=resume,
            progress=lambda done, total: progress.update(task, completed=done),
        )
    if done.discarded:
        typer.echo(
            f"an unfinished run had made {done.discarded} embeddings for {output}; they were not "
            "used, since --resume was not given",
            err=True,
        )
    skipped = f", {scan.num_bad} bad rows left out" if scan.num_bad else ""
    resumed = f", {done.resumed} of them from an earlier run" if done.resumed else ""
    typer.echo(f"{done.num_rows} embeddings of size {done.size} in {output}{resumed}{skipped}")
