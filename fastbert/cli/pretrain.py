"""``fastbert pretrain``: texts to a masked language model."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, needing

__all__ = ["command"]


def _tokens(text: str | None) -> int | None:
    """``32k``, ``100M``, ``2B`` or a plain number."""
    if text is None:
        return None
    scale = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    try:
        value = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        value = 0
    if value < 1:
        raise typer.BadParameter(f"expected a number of tokens such as 32k or 100M, got {text!r}")
    return round(value)


def command(
    texts: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders and globs: .txt (a blank line between documents), .csv, .tsv, "
            ".jsonl (all also .gz), .parquet (a document in each row)."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the run; again to go on with it.")
    ],
    model: Annotated[
        str | None, typer.Option(help="A BERT to go on with; without it one from scratch.")
    ] = None,
    size: Annotated[
        str, typer.Option(help="From scratch: tiny, mini, small, medium, base or large.")
    ] = "small",
    tokenizer: Annotated[
        str | None, typer.Option(help="Of the model by default; from scratch one is trained.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(min=100, help="Of a tokenizer to train.")] = 30522,
    cased: Annotated[
        bool, typer.Option("--cased", help="A tokenizer to train keeps case.")
    ] = False,
    column: Annotated[
        str | None, typer.Option(help="Column or key of the text; default: text.")
    ] = None,
    language: Annotated[str, typer.Option(help="Code of the language, to end sentences.")] = "en",
    tokens: Annotated[str | None, typer.Option(help="How long: so many tokens (100M).")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="How long: so many steps.")] = None,
    hours: Annotated[float | None, typer.Option(help="How long: about so many hours.")] = None,
    batch_tokens: Annotated[str, typer.Option(help="Real tokens in a step.")] = "32k",
    device_tokens: Annotated[str, typer.Option(help="Real tokens in one pass.")] = "8k",
    max_length: Annotated[int, typer.Option(help="Tokens of an example at most.")] = 128,
    mask: Annotated[
        str, typer.Option(help="Share of masked tokens, or from one to another: 0.30:0.15.")
    ] = "0.15",
    nsp: Annotated[
        bool, typer.Option("--nsp/--no-nsp", help="Next-sentence prediction, or single segments.")
    ] = True,
    whole_words: Annotated[
        bool, typer.Option("--whole-words", help="Mask all pieces of a word, or none.")
    ] = False,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its highest; default: 5e-4, with --model 5e-5.")
    ] = None,
    held_out: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Share of documents to evaluate on.")
    ] = 0.01,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    evaluate_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between evaluations; default: --save-every.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="End after so many evaluations without gain.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that make batches.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order, pairs and masks.")] = 0,
    device: Device = "auto",
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Share parameters and optimiser out among processes.")
    ] = False,
    cache_dir: Annotated[
        str | None, typer.Option(help="For tokenised texts; default: that of datasets.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and end.")] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(help="A setting that may differ from what the run was begun with."),
    ] = None,
) -> None:
    """Pre-train a BERT on TEXTS: masked language modelling and next-sentence prediction.

    The same command again goes on from the last checkpoint, to the very same weights as if nothing
    had happened. Ctrl-C and SIGTERM end it behind a checkpoint.
    """
    from rich.console import Console

    with needing("train"):
        from ..training.pretraining import prepare
        from ..training.progress import Shown
        from ..training.request import Request

    console = Console(stderr=True)
    request = Request(
        texts=tuple(texts),
        output=str(output),
        model=model,
        size=size,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        cased=cased,
        column=column,
        language=language,
        tokens=_tokens(tokens),
        steps=steps,
        hours=hours,
        batch_tokens=_tokens(batch_tokens),
        device_tokens=_tokens(device_tokens),
        max_length=max_length,
        mask=mask,
        nsp=nsp,
        whole_words=whole_words,
        learning_rate=learning_rate,
        held_out=held_out,
        save_every=save_every,
        evaluate_every=evaluate_every,
        patience=patience,
        seed=seed,
        workers=workers,
        device=device,
        fsdp=fsdp,
        cache_dir=cache_dir,
    )
    pretraining = prepare(request)
    plan = pretraining.plan()
    if pretraining.processes.is_main:
        for name, text in plan.lines():
            typer.echo(f"{name:>11}: {text}", err=True)
        for reason in pretraining.corpus.bad:
            typer.echo(f"left out: {reason}", err=True)
    if dry_run:
        return
    shown = Shown(
        console, "pre-training", ("mlm_accuracy", "held out: masked right"), plan.matrix_share
    )
    verdict = pretraining.train(plan, allow=allow_change or (), callbacks=[shown])
    if not pretraining.processes.is_main:
        return
    if verdict.overhead is not None:
        typer.echo(f"time outside the model: {verdict.overhead:.1%}", err=True)
    typer.echo(f"{output / 'final'}: {verdict}")
