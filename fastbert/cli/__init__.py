"""The command ``fastbert``.

Exit codes: 0 done, 1 a check failed or an unexpected error, 2 wrong usage, 3 bad input, 4 the model
cannot be loaded, 5 the output cannot be written, 130 interrupted.
"""

import os
import sys

import typer

from ..tasks.errors import TaskError
from . import bench, check, embed, fill_mask, kernels

__all__ = ["app", "main"]

app = typer.Typer(
    name="fastbert",
    help="BERT-family encoders at the speed of the hardware.",
    epilog="Exit codes: 0 done, 1 a check failed or an unexpected error, 2 wrong usage, "
    "3 bad input, 4 the model cannot be loaded, 5 the output cannot be written, 130 interrupted. "
    "FASTBERT_DEBUG=1 shows tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("embed")(embed.command)
app.command("fill-mask")(fill_mask.command)
app.command("check")(check.command)
app.add_typer(bench.app, name="bench")
app.add_typer(kernels.app, name="kernels")


def main() -> None:
    """Run the command; a foreseen failure is one message and an exit code, not a traceback."""
    try:
        app()
    except TaskError as error:
        if os.environ.get("FASTBERT_DEBUG"):
            raise
        typer.echo(f"fastbert: {error}", err=True)
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code == 130:  # typer's answer to Ctrl-C, which says nothing by itself
            typer.echo("fastbert: interrupted", err=True)
        raise
