"""``fastbert.AutoModel`` and its kin: the drop-in class of a checkpoint where there is one."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from . import registry

__all__ = ["auto_class"]

_log = logging.getLogger("fastbert")
_OPTIONS = ("padding", "skip_logits", "cuda_graphs", "frozen")  # of drop-in classes


class _Auto:
    """transformers' class of the same name, which gives fastbert's classes where there are some.

    Nothing changes for who uses transformers' own.
    """

    theirs: type

    def __init__(self, *args: Any, **kwargs: Any):
        raise OSError(
            f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(...) or "
            ".from_config(config)"
        )

    @classmethod
    def from_pretrained(cls, source: str | Path, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """As transformers' ``from_pretrained``; takes the options of `fastbert.accelerate` too.

        Raises:
            ValueError: such an option for a family that is not covered.
        """
        config = kwargs.get("config")
        if isinstance(config, PreTrainedConfig):
            kind = config.model_type
        elif (Path(source) / "adapter_config.json").is_file():
            kind = None  # transformers reads whose adapter it is
        else:
            kind = PreTrainedConfig.get_config_dict(config or source, **kwargs)[0].get("model_type")
        ours = cls._ours(kind, kwargs)
        return (ours or cls.theirs).from_pretrained(source, *args, **kwargs)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
        """As transformers' ``from_config``.

        Raises:
            ValueError: as `from_pretrained`.
        """
        ours = cls._ours(config.model_type, kwargs)
        return cls.theirs.from_config(config, **kwargs) if ours is None else ours(config, **kwargs)

    @classmethod
    def _ours(cls, kind: str | None, options: dict[str, Any]) -> type[PreTrainedModel] | None:
        names = cls.theirs._model_mapping._model_mapping.get(kind, ())
        for name in [names] if isinstance(names, str) else names:
            found = registry.class_named(name) if kind in registry.MODEL_TYPES else None
            if found is not None:
                return found
        asked = [name for name in _OPTIONS if name in options]
        if asked:
            raise ValueError(
                f"{cls.__name__}: expected no {', '.join(asked)} for a model of type {kind!r}, "
                "which is not covered, got it"
            )
        _log.warning("fastbert.%s gives transformers' own class for type %r", cls.__name__, kind)
        return None


@cache
def auto_class(theirs: type) -> type:
    """fastbert's class for one of transformers'."""
    doc = f"{_Auto.__doc__.replace('class of the same name', theirs.__name__)}"
    namespace = {"theirs": theirs, "__doc__": doc, "__module__": "fastbert"}
    return type(theirs.__name__, (_Auto,), namespace)
