"""Runs the command in a process of its own that sends itself a signal at a chosen moment.

The moments are the steps that leave something on the disk or do work: every batch that is encoded,
every flush to the disk, every file put in place. They are counted, so that a test does not depend
on how fast the machine is.
"""

import os
from pathlib import Path

from forked import call


def run(arguments: list, *, window: int, number: int | None = None, log: Path | None = None,
        at: int | None = None) -> int:  # fmt: skip
    """Run ``fastbert ARGUMENTS`` and give its exit code.

    Args:
        arguments: of the command.
        window: texts that are written together.
        number: the signal that the process sends itself, if any.
        log: a file that gets a line for every moment: what it was and how many texts it encoded.
        at: the moment, from 0.
    """
    return call(_main, arguments, window, number, log, at)


def _main(arguments: list, window: int, number: int | None, log: Path, at: int | None) -> None:
    import sys

    import fastbert
    from fastbert import cli
    from fastbert.tasks import embed_file, writing
    from fastbert.tasks.embed import Embedder

    embed_file.WINDOW = window
    moments = 0

    def counted(what, function, weigh=lambda *args: 0):
        def call(*args, **kwargs):
            nonlocal moments
            with open(log, "a") as file:
                file.write(f"{what} {weigh(*args)}\n")
            if moments == at:
                os.kill(os.getpid(), number)
            moments += 1
            return function(*args, **kwargs)

        return call

    texts_of = lambda self, features: len(features["input_ids"])  # noqa: E731
    Embedder._encode = counted("encode", Embedder._encode, texts_of)
    writing.os.fsync = counted("to disk", os.fsync)
    replace, placed = counted("in place", Path.replace), counted("placed", lambda: None)
    writing.Path.replace = lambda *paths: (replace(*paths), placed())[0]
    sys.argv = ["fastbert", *map(str, arguments)]
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    sys.stdout = sys.stderr
    with fastbert.backend("torch"):
        cli.main()
