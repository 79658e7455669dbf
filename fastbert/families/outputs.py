"""transformers' output classes, made without the questions that their constructor asks.

An output is an ordered dictionary and a dataclass at once: every field is an attribute, and those
that are not None are items too. The constructor finds out anew what its fields are for each of them
and whether somebody passed pairs instead, which takes as long as a product for a short text.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

import torch
from transformers.utils import ModelOutput

__all__ = ["output_of"]

# Class -> all fields as None, in their order; None where it is not made as the others are.
_EMPTY: dict[type, dict[str, None] | None] = {}


def _empty(cls: type) -> dict[str, None] | None:
    if (
        cls.__post_init__ is not ModelOutput.__post_init__
        or cls.__setitem__ is not ModelOutput.__setitem__
        or any(field.default is not None for field in dataclasses.fields(cls)[1:])
    ):
        return None
    return dict.fromkeys(field.name for field in dataclasses.fields(cls))


def output_of(cls: type[ModelOutput], **values: Any) -> ModelOutput:
    """``cls(**values)`` for tensors and tuples of them."""
    if torch.compiler.is_compiling():  # which knows the constructor
        return cls(**values)
    if cls not in _EMPTY:
        _EMPTY[cls] = _empty(cls)
    empty = _EMPTY[cls]
    if empty is None:
        return cls(**values)
    output = cls.__new__(cls)
    attributes = output.__dict__
    attributes.update(empty)
    attributes.update(values)
    for name in empty:
        if attributes[name] is not None:
            OrderedDict.__setitem__(output, name, attributes[name])
    return output
