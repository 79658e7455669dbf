"""The command ``fastbert``.

Exit codes: 0 done, 1 a check failed or an unexpected error, 2 wrong usage, 3 bad input, 4 the model
cannot be loaded, 5 the output cannot be written, 130 interrupted, 143 terminated.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from .. import __version__
from ..tasks.errors import TaskError
from . import bench, check, embed, finetune, generate, kernels, predict, pretrain

__all__ = ["app", "main"]

app = typer.Typer(
    name="fastbert",
    help="BERT-family encoders at the speed of the hardware.",
    epilog="Exit codes: 0 done, 1 a check failed or an unexpected error, 2 wrong usage, "
    "3 bad input, 4 the model cannot be loaded, 5 the output cannot be written, 130 interrupted, "
    "143 terminated. FASTBERT_DEBUG=1 shows tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("embed")(embed.command)
app.command("fill-mask")(generate.fill_mask)
app.command("generate")(generate.generate)
app.command("score")(generate.score)
app.command("pretrain")(pretrain.command)
app.command("finetune")(finetune.command)
app.command("predict")(predict.predict)
app.command("evaluate")(predict.evaluate)
app.command("classify")(predict.classify)
app.command("answer")(predict.answer)
app.command("check")(check.command)
app.add_typer(bench.app, name="bench")
app.add_typer(kernels.app, name="kernels")

_TERMINATED = 128 + signal.SIGTERM
_LAST_WORDS = {130: "interrupted", _TERMINATED: "terminated"}  # 130: typer's answer to Ctrl-C


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastbert {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@contextmanager
def _cleaning_up_when_terminated() -> Iterator[None]:
    """SIGTERM, which schedulers send, ends the program as Ctrl-C does: nothing is half done."""

    def leave(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one may not stop the cleaning up
        sys.exit(_TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Run the command; a foreseen failure is one message and an exit code, not a traceback."""
    try:
        with _cleaning_up_when_terminated():
            app()
    except TaskError as error:
        if os.environ.get("FASTBERT_DEBUG"):
            raise
        typer.echo(f"fastbert: {error}", err=True)
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code in _LAST_WORDS:
            typer.echo(f"fastbert: {_LAST_WORDS[stop.code]}", err=True)
        raise
