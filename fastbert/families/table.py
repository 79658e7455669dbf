"""``python -m fastbert.families.table README.md``: the table of families, from the one list."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from .family import Family
from .registry import MODEL_TYPES, load

__all__ = ["main", "rows", "written_into"]

_BEGIN, _END = "<!-- families:begin -->", "<!-- families:end -->"
_DECODER = ("CausalLM", "LMHeadModel", "Decoder")


def _sum_of(family: Family) -> str:
    """What is summed up for a token, in words."""
    sums = family.sums
    positions = "positions of tokens" if sums.counts_tokens else "positions of columns"
    parts = ["words", positions, *["types"] * (sums.token_type is not None)]
    parts += [name.removesuffix("_embeddings").replace("_", " ") + "s" for name in sums.further]
    return ", ".join([*parts, *["projected to the layers' width"] * (sums.projection is not None)])


def _cells(family: Family) -> tuple[str, str, str]:
    name = family.model.__name__
    prefix = name.removesuffix("Model").removesuffix("Encoder")
    names = [name.removeprefix(prefix).removeprefix("For") for name in family.heads]
    heads = [name for name in names if name not in _DECODER]
    return f"`{name}`", ", ".join(heads), _sum_of(family)


def rows() -> str:
    """A line of Markdown for each family."""
    lines = ["| `model_type` | class | heads, `...For` | embeddings |", "|---|---|---|---|"]
    for model_type in MODEL_TYPES:
        lines.append(f"| {model_type} | {' | '.join(_cells(load(model_type)))} |")
    return "\n".join(lines) + "\n"


def written_into(text: str) -> str:
    """A text with the table between its marks."""
    pattern = re.compile(rf"{_BEGIN}\n.*?{_END}", re.S)
    assert pattern.search(text), f"expected {_BEGIN} and {_END}"
    return pattern.sub(lambda _: f"{_BEGIN}\n{rows()}{_END}", text)


def main(path: str) -> None:
    """Write the table into a file."""
    file = Path(path)
    file.write_text(written_into(file.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
