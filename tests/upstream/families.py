"""What transformers' common tests need to know of each family; a family joins by an entry."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import transformers

__all__ = ["FAMILIES", "Family", "Tester"]


class Family(NamedTuple):
    """A family of models as the tests see it.

    Attributes:
        config: transformers' configuration class.
        classes: names that transformers and fastbert both have.
        sizes: of a small model, in the configuration's words.
        options: attributes of the test class, in the words of ``ModelTesterMixin``.
    """

    config: type[transformers.PreTrainedConfig]
    classes: tuple[str, ...]
    sizes: dict[str, int]
    options: Mapping[str, object] = MappingProxyType({})


FAMILIES = {
    "bert": Family(
        transformers.BertConfig,
        (
            "BertModel",
            "BertLMHeadModel",
            "BertForMaskedLM",
            "BertForMultipleChoice",
            "BertForNextSentencePrediction",
            "BertForPreTraining",
            "BertForQuestionAnswering",
            "BertForSequenceClassification",
            "BertForTokenClassification",
        ),
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 37,
            "max_position_embeddings": 64,
        },
    ),
}


class Tester:
    """Small models and batches; ``ModelTesterMixin`` reads its attributes."""

    batch_size, seq_length, num_choices, is_training = 5, 7, 3, True

    def __init__(self, family: Family):
        self.family = family
        for name, value in family.sizes.items():
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
            "token_type_ids": torch.randint(0, 2, shape, generator=generator),
        }
        return self.get_config(), inputs


def labels_for_pre_training(inputs: dict, tester: Tester) -> dict:
    """Both labels that this head needs for a loss."""
    return {
        **inputs,
        "labels": torch.zeros(tester.batch_size, tester.seq_length, dtype=torch.long),
        "next_sentence_label": torch.zeros(tester.batch_size, dtype=torch.long),
    }
