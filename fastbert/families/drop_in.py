"""What every drop-in class is: its transformers parent, whose modules have packed twins."""

from __future__ import annotations

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

__all__ = ["DropIn", "check_config", "set_options", "to_twins", "twin"]

# transformers' class -> the class that replaces it; families fill it with `twin`.
_TWINS: dict[type[nn.Module], type[nn.Module]] = {}


def twin(cls: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: instances of the last base, transformers' class, can become a ``cls``."""
    _TWINS[cls.__bases__[-1]] = cls
    return cls


def to_twins(model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
    """Give every module inside ``model``, itself included, the class of its drop-in twin.

    Returns:
        The modules that changed, with the class each had before.
    """
    changed = []
    for module in model.modules():
        cls = _TWINS.get(type(module))
        if cls is not None:
            changed.append((module, type(module)))
            module.__class__ = cls
            if isinstance(module, PreTrainedModel):
                # transformers looks up by class name what output_hidden_states may record.
                dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), module._can_record_outputs)
    return changed


class DropIn:
    """A transformers model that runs packed; comes first among the bases.

    Attributes:
        skip_logits: whether training with labels computes the logits of labelled tokens only and
            returns None in their place; `set_options` sets it.
    """

    skip_logits = False
    _can_skip_logits = False  # whether there are logits over the vocabulary

    def __init__(self, config, *args, skip_logits: bool = False, **kwargs):
        check_config(config)
        super().__init__(config, *args, **kwargs)
        to_twins(self)
        set_options(self, skip_logits=skip_logits)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """transformers' ``from_pretrained``; pickled weights load only with
        ``use_safetensors=False``.

        A pickle can run code when it is opened, so asking for it is left to the caller. Beside
        transformers' arguments it takes the options of `fastbert.accelerate` (``skip_logits``).
        """
        kwargs.setdefault("use_safetensors", True)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


def set_options(model: nn.Module, *, skip_logits: bool) -> list[DropIn]:
    """Set what drop-in models inside ``model``, itself included, do otherwise than by default.

    Returns:
        The modules that were set.

    Raises:
        ValueError: an option that none of them has.
    """
    if not skip_logits:
        return []
    able = [m for m in model.modules() if isinstance(m, DropIn) and m._can_skip_logits]
    if not able:
        raise ValueError(
            "skip_logits: expected a model with a masked-LM head (BertForMaskedLM, "
            f"BertForPreTraining), got a {type(model).__name__}, which has no logits over the "
            "vocabulary to leave out"
        )
    for module in able:
        module.skip_logits = True
    return able


def check_config(config) -> None:
    """Refuse a config that asks for something BERT in transformers 5 would silently leave out.

    Raises:
        NotImplementedError: relative position embeddings, which transformers 5 no longer has for
        BERT.
    """
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        raise NotImplementedError(
            "fastbert: expected config.position_embedding_type='absolute', got "
            f"{kind!r}. transformers 5 ignores this setting for BERT, so the model would compute "
            "something else than it was trained for."
        )
