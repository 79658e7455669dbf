"""Real texts to try pre-training on: the Wikipedia articles that `gensim` brings along.

``python -m fastbert.demo.wikipedia FILE`` writes them as plain text, a blank line between articles.
They are a hundred articles of the English Wikipedia of 2012, under CC BY-SA; see each article's
history there for its authors. Nothing of them is part of this package.
"""

from __future__ import annotations

import bz2
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

__all__ = ["articles", "main"]

_FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_WORDS = 8  # lines of fewer are headings, captions and lists


def articles() -> Iterator[str]:
    """The text of each article, without markup.

    Raises:
        ImportError: gensim is not installed.
    """
    try:
        from gensim.corpora.wikicorpus import extract_pages, filter_wiki
        from gensim.test.utils import datapath
    except ImportError as error:
        raise ImportError(
            f"the articles come with gensim ({error}): "
            "pip install 'fastbert-triton[pretrain-example]'"
        ) from error
    with bz2.open(datapath(_FILE)) as file:
        for _, marked, _ in extract_pages(file, filter_namespaces=("0",)):
            lines = (line.strip(" *#:;'\"") for line in filter_wiki(marked).splitlines())
            kept = [
                re.sub(r"'{2,}|\[\[|\]\]", "", line)
                for line in lines
                if len(line.split()) >= _WORDS and not line.startswith(("=", "|", "!", "{"))
            ]
            if kept:
                yield "\n".join(kept)


def main() -> None:
    """Write the articles to the file that the first argument names."""
    if len(sys.argv) != 2:
        sys.exit("expected the name of a file to write: python -m fastbert.demo.wikipedia FILE")
    texts = list(articles())
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(texts), "utf-8")
    typer.echo(f"{len(texts)} articles, {sum(map(len, texts)):,} characters in {path}")


if __name__ == "__main__":
    main()
