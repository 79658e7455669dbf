"""Trying generation on real text: ``python -m fastbert.demo.generation texts FOLDER``, train on
FOLDER/train.txt, then ``... compare RUN FOLDER/held-out.txt``.

The first writes Wikipedia articles (`fastbert.demo.wikipedia`) and, one on a line, sentences of
articles that are not among them. The second scores these sentences with the model of a run and
with what it was begun with: the demo's MiniLM and a new head.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..generation import MaskedModel
from ..generation.score_file import score_file
from ..tasks.loading import load_for_training, load_tokenizer
from ..tasks.reading import TextFile
from . import model_folder
from .wikipedia import articles

__all__ = ["app", "compare", "texts"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_HELD_OUT = 10  # articles
_SENTENCES = 60
_WORDS = range(8, 25)


@app.command()
def texts(folder: Annotated[Path, typer.Argument(help="Where train.txt and held-out.txt go.")]):
    """Write the articles to train on, and sentences of others."""
    folder.mkdir(parents=True, exist_ok=True)
    every = list(articles())
    (folder / "train.txt").write_text("\n\n".join(every[:-_HELD_OUT]), "utf-8")
    sentences = [
        sentence
        for article in every[-_HELD_OUT:]
        for sentence in re.split(r"(?<=[.!?])\s+", article)
        if len(sentence.split()) in _WORDS and sentence.isascii() and sentence.endswith(".")
    ]
    step = max(len(sentences) // _SENTENCES, 1)
    held_out = sentences[::step][:_SENTENCES]
    (folder / "held-out.txt").write_text("\n".join(held_out) + "\n", "utf-8")
    typer.echo(f"{len(every) - _HELD_OUT} articles and {len(held_out)} sentences in {folder}")


@app.command()
def compare(
    run: Annotated[Path, typer.Argument(help="Of fastbert pretrain --model MINILM.")],
    held_out: Annotated[Path, typer.Argument(help="Sentences, one on a line.")],
) -> None:
    """Score sentences with the model before it was trained, and after."""
    torch.manual_seed(0)
    before, _ = load_for_training("ForMaskedLM", model_folder())
    models = {
        "before": MaskedModel(before.eval(), load_tokenizer(model_folder())),
        "after": MaskedModel.load(run / "best", device=torch.device("cpu")),
    }
    for name, model in models.items():
        found = score_file(model, TextFile(held_out))
        typer.echo(
            f"{name:>6}: pseudo-perplexity {found.perplexity:,.0f} of {found.count} sentences "
            f"that were not trained on, {found.tokens:,} tokens"
        )


if __name__ == "__main__":
    app()
