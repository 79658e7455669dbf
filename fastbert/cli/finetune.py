"""``fastbert finetune``: tables to a model that is scored."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Long, LongText, needing

__all__ = ["command"]


def command(
    train: Annotated[
        str,
        typer.Argument(
            help="Rows to train on: .csv, .tsv, .jsonl (all also .gz), .json, .parquet, .conll, or "
            "a folder of datasets."
        ),
    ],
    dev: Annotated[
        str | None, typer.Argument(help="Rows to choose the model by; default: --dev-share.")
    ] = None,
    test: Annotated[
        str | None, typer.Argument(help="Rows to score it on; default: --test-share.")
    ] = None,
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the run; again to go on with it.")
    ],
    model: Annotated[str, typer.Option(help="A BERT: a folder, or a name on the hub.")],
    task: Annotated[
        str | None,
        typer.Option(
            help="classification, multi-label, regression, tagging, answering, multiple-choice, "
            "embeddings; default: by columns."
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(min=0.01, help="How often each row is seen.")] = 3.0,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows of a step on average, counted in tokens.")
    ] = 32,
    device_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one pass.")] = 8192,
    max_length: Annotated[int, typer.Option(min=3, help="Tokens of a row at most.")] = 128,
    long: Long = LongText.cut,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 5e-5,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Of AdamW.")] = 0.01,
    warmup: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the steps.")] = 0.06,
    dropout: Annotated[
        float | None, typer.Option(min=0.0, max=0.99, help="Default: that of the model.")
    ] = None,
    freeze: Annotated[
        int | None, typer.Option(min=0, help="Embeddings and so many layers stay as they are.")
    ] = None,
    lora: Annotated[
        int | None, typer.Option(min=1, help="Rank of updates to layers that stay as they are.")
    ] = None,
    balance: Annotated[
        bool, typer.Option("--balance", help="Rare classes weigh as much as frequent ones.")
    ] = False,
    label_smoothing: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of the target for all classes.")
    ] = 0.0,
    dev_share: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Of TRAIN, where DEV is not given.")
    ] = 0.1,
    test_share: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Of TRAIN, where TEST is not given.")
    ] = 0.0,
    patience: Annotated[
        int, typer.Option(min=0, help="End after so many evaluations without gain; 0: never.")
    ] = 2,
    evaluate_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between evaluations; default: an epoch.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that make batches.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of splits, new weights and order.")] = 0,
    device: Device = "auto",
    cache_dir: Annotated[
        str | None, typer.Option(help="For tables; default: that of datasets.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the report and end.")] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(help="A setting that may differ from what the run was begun with."),
    ] = None,
) -> None:
    """Fine-tune a BERT on TRAIN: classes of texts or pairs, labels, numbers, entities, answers.

    Columns: text (or text_a and text_b) with label, labels (a list) or score; tokens with tags, or
    text with spans; question, context and answers; context, choices and label; query and passage.
    The same command again goes on from the last checkpoint.
    """
    from rich.console import Console

    with needing("train"):
        from ..finetuning.finetune import Request, prepare
        from ..training.progress import Shown

    finetuning = prepare(
        Request(
            train=train,
            output=str(output),
            model=model,
            dev=dev,
            test=test,
            task=task,
            epochs=epochs,
            batch_size=batch_size,
            device_tokens=device_tokens,
            max_length=max_length,
            long=long.value,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup=warmup,
            dropout=dropout,
            freeze=freeze,
            lora=lora,
            balance=balance,
            label_smoothing=label_smoothing,
            dev_share=dev_share,
            test_share=test_share,
            patience=patience,
            evaluate_every=evaluate_every,
            seed=seed,
            workers=workers,
            device=device,
            cache_dir=cache_dir,
        )
    )
    report = finetuning.report()
    if finetuning.processes.is_main:
        for name, text in report.lines():
            typer.echo(f"{name:>11}: {text}", err=True)
        if finetuning.new:
            typer.echo(f"{'new':>11}: {', '.join(finetuning.new)}", err=True)
    if dry_run:
        return
    shown = Shown(Console(stderr=True), "fine-tuning", (report.metric, f"dev: {report.metric}"))
    verdict = finetuning.train(allow=allow_change or (), callbacks=[shown])
    if not finetuning.processes.is_main:
        return
    for line in verdict.lines():
        typer.echo(line, err=True)
    if verdict.overhead is not None:
        typer.echo(f"time outside the model: {verdict.overhead:.1%}", err=True)
    typer.echo(f"{output / 'best'}: {verdict}")
