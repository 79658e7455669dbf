"""Names of transformers: its own objects where they need no acceleration, and which class is right
for which checkpoint."""

from __future__ import annotations

from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

__all__ = ["class_for", "from_transformers"]


def from_transformers(name: str) -> Any:
    """What transformers has under this name.

    Raises:
        AttributeError: it has nothing.
        ImportError: a model, which would run as slowly as before without a word.
    """
    value = getattr(transformers, name, None)
    if value is None:
        raise AttributeError(f"module 'fastbert' has no attribute {name!r}")
    if isinstance(value, type) and issubclass(value, _BaseAutoModelClass):
        from .auto import auto_class  # which needs all of the classes

        return auto_class(value)
    is_model = isinstance(value, type) and issubclass(value, transformers.PreTrainedModel)
    if is_model or name == "pipeline" or name.startswith(("TF", "Flax")):
        made = f"transformers.{name}(...)" if name == "pipeline" else f"{name}.from_pretrained(...)"
        inside = "the pipeline's .model" if name == "pipeline" else "it"
        raise ImportError(
            f"fastbert has no {name}: take transformers' own, model = {made}, and give {inside} to "
            "fastbert.accelerate, which makes the encoder inside fast; it says so if there is none",
            name="fastbert",
        )
    return value


def class_for(class_name: str, model_type: str) -> str:
    """The class of transformers that does for another type of model what ``class_name`` does for
    its own."""
    for mapping in (v for k, v in vars(modeling_auto).items() if k.endswith("_MAPPING_NAMES")):
        if class_name in mapping.values() and model_type in mapping:
            found = mapping[model_type]
            return found if isinstance(found, str) else found[0]
    return "AutoModel"
