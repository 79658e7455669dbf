"""Training a part of a model: frozen layers, low-rank updates."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..families.registry import family_of
from ..tasks.errors import InputError, LoadError

__all__ = ["partly", "save_merged"]

_PRODUCTS = ("query", "key", "value", "attention_output", "intermediate", "output")
_HEADS = ("classifier", "qa_outputs", "pre_classifier", "sequence_summary")


def partly(
    model: PreTrainedModel, freeze: int | None, lora: int | None, seed: int
) -> PreTrainedModel:
    """The model, of which only a part is trained.

    Args:
        freeze: the embeddings and so many layers stay as they are; None for nothing.
        lora: rank of the updates that all products of the layers get (Hu et al., 2106.09685), by
            PEFT, beside a head, if there is one, that is trained whole; None for none.
        seed: of the updates.

    Raises:
        InputError: more layers than there are, or both.
        LoadError: PEFT is not installed.
    """
    if freeze is not None and lora is not None:
        raise InputError("expected --freeze or --lora, got both; LoRA leaves all layers frozen")
    family = family_of(type(model.base_model))
    if freeze is not None:
        layers = family.layers(model.base_model)
        if freeze > len(layers):
            raise InputError(
                f"expected --freeze of at most {len(layers)}, the layers of the model, got {freeze}"
            )
        for part in (model.base_model.embeddings, *layers[:freeze]):
            part.requires_grad_(False)
    if lora is None:
        return model
    try:
        import peft
    except ImportError as error:
        raise LoadError(f"--lora needs PEFT ({error}): pip install peft") from error
    heads = [name for name in _HEADS if hasattr(model, name)]
    if heads and getattr(model.base_model, "pooler", None) is not None:
        heads.append("pooler")
    layers = family.layers(model.base_model)
    products = {id(family.parts.of(layer)[part]) for layer in layers for part in _PRODUCTS}
    config = peft.LoraConfig(
        r=lora,
        lora_alpha=2 * lora,
        target_modules=[name for name, m in model.named_modules() if id(m) in products],
        modules_to_save=heads or None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


def save_merged(model: nn.Module, folder: Path | str) -> None:
    """A model with low-rank updates as the plain one that it is equal to."""
    copy.deepcopy(model).merge_and_unload().save_pretrained(folder)
