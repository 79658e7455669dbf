"""Outputs that are made directly are those of the constructor."""

import pickle
from dataclasses import dataclass

import pytest
import torch
from torch.utils import _pytree
from transformers.utils import ModelOutput

from fastbert.families.outputs import output_of
from fastbert.families.registry import MODEL_TYPES, load

CLASSES = sorted({load(name).output for name in MODEL_TYPES}, key=lambda cls: cls.__name__)
X = torch.arange(6.0).view(1, 2, 3)
VALUES = {
    "last_hidden_state": {"last_hidden_state": X},
    "more": {"attentions": (X, X), "last_hidden_state": X, "hidden_states": (X, X + 1)},
    "nothing in front": {"hidden_states": (X,)},
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("cls", CLASSES)
def test_an_output_is_what_the_constructor_makes(cls, values):
    found, expected = output_of(cls, **values), cls(**values)
    assert type(found) is cls
    assert list(found.items()) == list(expected.items())
    assert list(vars(found).items()) == list(vars(expected).items())
    assert len(found) == len(expected) and found[0] is expected[0]
    assert all(map(torch.equal, *(_pytree.tree_leaves(each) for each in (found, expected))))
    assert str(found) == str(expected) == str(pickle.loads(pickle.dumps(found)))
    found["last_hidden_state"] = X + 2
    found.hidden_states = (X,)
    assert found.last_hidden_state is found["last_hidden_state"] and "hidden_states" in found


def test_an_output_of_another_make_is_made_by_its_constructor():
    @dataclass
    class Counted(ModelOutput):
        last_hidden_state: torch.Tensor = None

        def __post_init__(self):
            super().__post_init__()
            self["count"] = 1

    assert list(output_of(Counted, last_hidden_state=X)) == ["last_hidden_state", "count"]
