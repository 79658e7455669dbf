"""``fastbert generate``, ``fill-mask``, ``score``: texts from masked language models."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..tasks.errors import InputError
from .options import AllowPickle, Device, Dtype, OnBadRow, OnError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..generation import Draft, MaskedModel, Template

__all__ = ["fill_mask", "generate", "score"]

Model = Annotated[str, typer.Option(help="A folder or hub name of a masked language model.")]
AsJson = Annotated[bool, typer.Option("--json", help="A line of JSON for each.")]
Allow = Annotated[
    list[str] | None,
    typer.Option(help="Words that alone may stand at a mask: 2=paris,rome. May be repeated."),
]
Ban = Annotated[
    list[str] | None, typer.Option(help="A word that may not be written. May be repeated.")
]


class Method(str, Enum):
    """Ways of writing."""

    mask_predict = "mask-predict"
    gibbs = "gibbs"
    left_to_right = "left-to-right"


class Schedule(str, Enum):
    """`fastbert.generation.writing.SCHEDULES`."""

    linear = "linear"
    constant = "constant"


def _model(source: str, device: str, dtype: str, allow_pickle: bool) -> MaskedModel:
    from ..generation import MaskedModel
    from ..tasks.loading import resolve_device, resolve_dtype

    where = resolve_device(device)
    return MaskedModel.load(
        source, device=where, dtype=resolve_dtype(dtype, where), allow_pickle=allow_pickle
    )


def _constraints(allow: list[str] | None, ban: list[str] | None) -> dict[str, object]:
    allowed: dict[int, list[str]] = {}
    for one in allow or ():
        number, equals, words = one.partition("=")
        if not (equals and number.isdecimal() and words):
            raise InputError(f"expected --allow NUMBER=WORD,WORD, got {one!r}")
        listed = [word for word in words.split(",") if word]
        if int(number) in allowed:  # both have to hold
            listed = [word for word in allowed[int(number)] if word in listed]
            if not listed:
                raise InputError(
                    f"expected a word that all --allow for mask {number} have, got none"
                )
        allowed[int(number)] = listed
    return {"allowed": allowed, "banned": ban or ()}


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], object]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _tell(drafts: list[Draft], name: str, as_json: bool) -> None:
    for draft in drafts:
        if as_json:
            said = {"text": draft.text, "words": draft.words, name: draft.score}
            typer.echo(json.dumps(said, ensure_ascii=False))
        else:
            typer.echo(f"{draft.score:9.3f}  {draft.text}")


def generate(
    text: Annotated[
        str, typer.Argument(help="A text with one or more [MASK]; all other words stay.")
    ],
    model: Model,
    method: Annotated[
        Method,
        typer.Option(
            help="mask-predict: all words, then the least certain ones again; gibbs: one after the "
            "other in random order, over and over; left-to-right."
        ),
    ] = Method.mask_predict,
    length: Annotated[
        str | None,
        typer.Option(help="Tokens in place of the only [MASK]: 5, or 3:8 to choose by score."),
    ] = None,
    drafts: Annotated[int, typer.Option(min=1, help="Of each length, at once.")] = 4,
    iterations: Annotated[int, typer.Option(min=1, help="Of mask-predict; sweeps of gibbs.")] = 10,
    schedule: Annotated[
        Schedule,
        typer.Option(help="What mask-predict writes again: fewer words each time, or a third."),
    ] = Schedule.linear,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: the likeliest word always.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from so many words; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from so much of the probability.")] = 1.0,
    allow: Allow = None,
    ban: Ban = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    as_json: AsJson = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    allow_pickle: AllowPickle = False,
) -> None:
    """Write words at the masks of TEXT: drafts, best first.

    The score of a draft is the mean of the logarithms of the probability of each written word, when
    the model knows all others.
    """
    from ..generation import Sampling, gibbs, left_to_right, mask_predict

    sampling = Sampling(temperature, top_k, top_p).check()
    options = _constraints(allow, ban)
    lengths = _lengths(length)
    masked = _model(model, device, dtype, allow_pickle)
    templates = [_template(masked, text, each, options) for each in lengths for _ in range(drafts)]
    write = {
        Method.mask_predict: partial(mask_predict, iterations=iterations, schedule=schedule.value),
        Method.gibbs: partial(gibbs, sweeps=iterations),
        Method.left_to_right: left_to_right,
    }[method]
    with _bar("writing") as progress:
        written = write(masked, templates, sampling=sampling, seed=seed, progress=progress)
    distinct = {draft.text: draft for draft in written}.values()
    _tell(sorted(distinct, key=lambda draft: -draft.score), "score", as_json)


def _lengths(asked: str | None) -> list[int | None]:
    if asked is None:
        return [None]
    found = re.fullmatch(r"(\d+)(?::(\d+))?", asked)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise InputError(f"expected --length N or FROM:TO, got {asked!r}")
    return [*range(first, last + 1)]


def _template(
    model: MaskedModel, text: str, length: int | None, options: dict[str, object]
) -> Template:
    from ..generation import Template

    return Template.of(text, model.tokenizer, length=length, limit=model.limit, **options)


def fill_mask(
    text: Annotated[str, typer.Argument(help="A text with one or more mask tokens.")],
    model: Model,
    top_k: Annotated[int, typer.Option(min=1, help="Candidates for each mask.")] = 5,
    joint: Annotated[
        bool, typer.Option("--joint", help="Fill all masks together: the likeliest ways.")
    ] = False,
    beam: Annotated[int, typer.Option(min=1, help="Beginnings that --joint follows.")] = 32,
    allow: Allow = None,
    ban: Ban = None,
    as_json: AsJson = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    allow_pickle: AllowPickle = False,
) -> None:
    """Show the likeliest tokens for each [MASK] in TEXT, each for itself or all together."""
    from ..generation import fill

    if (allow or ban) and not joint:
        raise InputError("expected --allow and --ban with --joint, got them without")
    masked, options = _model(model, device, dtype, allow_pickle), _constraints(allow, ban)
    template = _template(masked, text, None, options)
    if joint:
        _tell(fill(masked, template, beam=beam, top=top_k), "log_probability", as_json)
        return
    from rich.console import Console
    from rich.table import Table

    mask, console = masked.tokenizer.mask_token, Console()
    (found,) = masked.log_probs([template.ids], [template.open])
    for number, scores in enumerate(found.exp(), start=1):
        best = scores.topk(min(top_k, scores.shape[-1]))
        title = f"{mask} {number}" if len(found) > 1 else None
        table = Table("token", "probability", "text", title=title)
        for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            token = masked.tokenizer.decode([index])
            whole = _filled(text, mask, number, token)
            table.add_row(token, f"{value:.4f}", whole)
            if as_json:
                said = {"mask": number, "token": token, "probability": value, "text": whole}
                typer.echo(json.dumps(said, ensure_ascii=False))
        if not as_json:
            console.print(table)


def _filled(text: str, mask: str, number: int, token: str) -> str:
    """The text with its ``number``-th mask replaced."""
    parts = text.split(mask)
    return mask.join(parts[:number]) + token + mask.join(parts[number:])


def score(
    file: Annotated[
        Path,
        typer.Argument(
            help="Texts: .txt (a line each), .csv, .tsv, .jsonl (these also .gz), .parquet, "
            "or - for standard input."
        ),
    ],
    model: Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .jsonl; default: standard output.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Column or key of the text; default: text.")
    ] = None,
    on_error: OnBadRow = OnError.stop,
    device: Device = "auto",
    dtype: Dtype = "auto",
    allow_pickle: AllowPickle = False,
) -> None:
    """Say how likely every text of FILE is: its pseudo-log-likelihood, as lines of JSON.

    For what is acceptable, or which of several transcripts is best: the higher the better; the
    perplexity is comparable between texts of different lengths.
    """
    from ..generation.score_file import score_file
    from ..tasks.reading import TextFile

    texts = TextFile(file, column)
    masked = _model(model, device, dtype, allow_pickle)
    with _bar("scoring") as progress:
        done = score_file(masked, texts, output, skip=on_error is OnError.skip, progress=progress)
    for line in done.lines:
        typer.echo(line)
    for row in done.skipped[:10]:
        typer.echo(f"left out: {texts.name}, line {row.line}: {row.reason}", err=True)
    typer.echo(
        f"{done.count:,} texts, {done.tokens:,} tokens, perplexity {done.perplexity:,.2f}"
        + (f", {len(done.skipped):,} bad rows left out" if done.skipped else ""),
        err=True,
    )
