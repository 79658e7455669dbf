"""``fastbert predict``, ``evaluate``, ``classify``, ``answer``: what checkpoints with heads say."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..tasks.errors import InputError
from .options import Device, Dtype, Long, LongText, OnBadRow, OnError, Resume, needing

if TYPE_CHECKING:
    from ..finetuning.embedding_model import SentenceEncoder
    from ..finetuning.predicting import Predictor

__all__ = ["answer", "classify", "evaluate", "predict"]


File = Annotated[
    str,
    typer.Argument(
        help="Rows: .csv, .tsv, .jsonl (all also .gz), .json, .parquet, .conll, or a folder of "
        "datasets."
    ),
]
Model = Annotated[
    str, typer.Option(help="A checkpoint with a head: RUN/best, a folder, a name on the hub.")
]
MaxLength = Annotated[
    int | None, typer.Option(min=3, help="Tokens of a row at most; default: what the model knows.")
]
CacheDir = Annotated[str | None, typer.Option(help="For tables; default: that of datasets.")]


def _predictor(
    model: str,
    device: str,
    dtype: str,
    max_length: int | None = None,
    long: LongText = LongText.cut,
) -> Predictor:
    from ..finetuning.predicting import Predictor
    from ..tasks.loading import resolve_device, resolve_dtype

    where = resolve_device(device)
    windows = long is LongText.windows
    return Predictor(model, where, resolve_dtype(dtype, where), max_length, windows=windows)


def _embedding_model(
    model: str, device: str, dtype: str, max_length: int | None, long: LongText
) -> SentenceEncoder:
    from ..finetuning.embedding_model import load_embedding_model
    from ..tasks.loading import resolve_device, resolve_dtype

    where = resolve_device(device)
    windows = long is LongText.windows
    return load_embedding_model(
        model, where, resolve_dtype(dtype, where), max_length, windows=windows
    )


def predict(
    file: File,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .jsonl, a line for each row.")],
    model: Model,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_length: MaxLength = None,
    long: Long = LongText.cut,
    on_error: OnBadRow = OnError.stop,
    resume: Resume = False,
    cache_dir: CacheDir = None,
) -> None:
    """Say for every row of FILE what MODEL makes of it: a class with probabilities, a number, tags.

    Columns as for fastbert finetune; labels are not looked at.
    """
    from rich.console import Console
    from rich.progress import Progress

    with needing("train"):
        from ..finetuning.predict_file import predict_file
        from ..finetuning.table import read_table

    table, console = read_table(file, cache_dir), Console(stderr=True)
    predictor, start = _predictor(model, device, dtype, max_length, long), time.perf_counter()
    with Progress(console=console, disable=not console.is_terminal) as bar:
        shown = bar.add_task("predicting", total=len(table))
        done = predict_file(
            table, predictor, output, skip=on_error is OnError.skip, resume=resume,
            progress=lambda count: bar.update(shown, completed=count),
        )  # fmt: skip
    for row, why in [*done.skipped.items()][:10]:
        typer.echo(f"left out: row {row}: {why}", err=True)
    if done.cut:
        did = "read in windows of" if predictor.windows else "cut to"
        typer.echo(f"{done.cut:,} rows were {did} {predictor.max_length} tokens", err=True)
    speed = (done.rows - done.resumed) / (time.perf_counter() - start)
    skipped = f", {len(done.skipped):,} bad rows left out" if done.skipped else ""
    resumed = f", {done.resumed:,} of them from an earlier run" if done.resumed else ""
    typer.echo(f"{output}: {done.rows:,} predictions{resumed}, {speed:,.0f} rows a second{skipped}")


def evaluate(
    file: File,
    model: Model,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_length: MaxLength = None,
    long: Long = LongText.cut,
    cache_dir: CacheDir = None,
) -> None:
    """Score MODEL on FILE, whose labels are right: metrics as JSON, a table by class beside it.

    MODEL may be one of sentence-transformers too, FILE with query and passage, or text_a, text_b
    and score.
    """
    with needing("train"):
        import sklearn  # noqa: F401 - said now, not behind the work

        from ..finetuning.embedding import embedding_task_of
        from ..finetuning.report import by_class_lines
        from ..finetuning.table import read_table

    table = read_table(file, cache_dir)
    if (task := embedding_task_of(model, table)) is not None:
        task.check(table)
        encoder = _embedding_model(model, device, dtype, max_length, long)
        scores = task.scores(encoder, table)
        typer.echo(json.dumps({"rows": len(table), **scores}))
        return
    predictor = _predictor(model, device, dtype, max_length, long)
    gold, predictions, cut = predictor.task.gold(table), [], 0
    for part in table.parts(1024):
        said, _, shorter = predictor(part)
        predictions, cut = predictions + said, cut + shorter
    for line in by_class_lines(predictor.task.by_class(predictions, gold)):
        typer.echo(line, err=True)
    scores = {"rows": len(table), "longer": cut, **predictor.task.score(predictions, gold)}
    typer.echo(json.dumps(scores))


def classify(
    text: Annotated[list[str], typer.Argument(help="Each is looked at for itself.")],
    model: Model,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Show what MODEL makes of a text or two."""
    with needing("train"):
        import datasets

        from ..finetuning.table import Table

    predictor = _predictor(model, device, dtype)
    _, described, _ = predictor(Table(datasets.Dataset.from_dict({"text": text}), "TEXT"))
    for said in described:
        typer.echo(json.dumps(said, ensure_ascii=False))


def answer(
    question: Annotated[str, typer.Argument(help="What to look for.")],
    context: Annotated[Path, typer.Option(help="A text file, of any length.")],
    model: Model,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_length: MaxLength = None,
) -> None:
    """Show the span of a text that answers a question, or that none does."""
    with needing("train"):
        import datasets

        from ..finetuning.table import Table

    predictor = _predictor(model, device, dtype, max_length)
    if predictor.task.name != "answering":
        raise InputError(
            f"expected a checkpoint that answers questions, got one for {predictor.task.name} in "
            f"{model!r}"
        )
    try:
        text = context.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"expected a text in {str(context)!r}: {error}") from error
    rows = datasets.Dataset.from_dict({"question": [question], "context": [text]})
    _, described, _ = predictor(Table(rows, str(context)))
    typer.echo(json.dumps(described[0], ensure_ascii=False))
