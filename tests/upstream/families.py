"""What transformers' common tests need to know of each family: all that the registry has, or those
that the environment's ``FAMILIES`` names."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import transformers

from fastbert.families import registry

__all__ = ["FAMILIES", "Family", "Tester"]


class Family(NamedTuple):
    """A family of models as the tests see it.

    Attributes:
        config: transformers' configuration class.
        classes: names that transformers and fastbert both have.
        sizes: of a small model, in the configuration's words.
        takes_types: whether models take token types.
        options: attributes of the test class, in the words of ``ModelTesterMixin``.
    """

    config: type[transformers.PreTrainedConfig]
    classes: tuple[str, ...]
    sizes: dict[str, int]
    takes_types: bool
    options: Mapping[str, object] = MappingProxyType({})


SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
}
OTHER_NAMES = {
    "distilbert": {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
    },
}


def _family(model_type: str) -> Family:
    family, names = registry.load(model_type), OTHER_NAMES.get(model_type, {})
    sizes = {names.get(name, name): value for name, value in SIZES.items()}
    classes = (family.model.__name__, *family.heads)
    takes_types = family.sums.token_type is not None
    sizes |= {"type_vocab_size": 2} if takes_types else {}
    return Family(family.config, classes, sizes, takes_types)


_NAMES = os.environ.get("FAMILIES") or ",".join(registry.MODEL_TYPES)
FAMILIES = {model_type: _family(model_type) for model_type in _NAMES.split(",")}


class Tester:
    """Small models and batches; ``ModelTesterMixin`` reads its attributes."""

    batch_size, seq_length, num_choices, is_training = 5, 7, 3, True

    def __init__(self, family: Family):
        self.family = family
        for name, value in SIZES.items():
            setattr(self, name, value)

    def get_config(self) -> transformers.PreTrainedConfig:
        return self.family.config(**self.family.sizes)

    def prepare_config_and_inputs_for_common(self):
        """A configuration, and ids of sequences of several lengths with their mask."""
        shape = (self.batch_size, self.seq_length)
        generator = torch.Generator().manual_seed(0)
        lengths = torch.tensor([self.seq_length, 3, 5, 1, 6])
        inputs = {
            "input_ids": torch.randint(3, self.vocab_size, shape, generator=generator),
            "attention_mask": (torch.arange(self.seq_length) < lengths[:, None]).long(),
        }
        if self.family.takes_types:
            inputs["token_type_ids"] = torch.randint(0, 2, shape, generator=generator)
        return self.get_config(), inputs


def labels_for_pre_training(inputs: dict, tester: Tester, model_class: type) -> dict:
    """All labels that this head needs for a loss."""
    labels = torch.zeros(tester.batch_size, tester.seq_length, dtype=torch.long)
    inputs = {**inputs, "labels": labels}
    wanted = inspect.signature(model_class.forward).parameters
    for name in ("next_sentence_label", "sentence_order_label"):
        if name in wanted:
            inputs[name] = torch.zeros(tester.batch_size, dtype=torch.long)
    return inputs
