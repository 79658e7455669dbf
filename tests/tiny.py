"""Tiny BERTs, batches and dtypes that several test files share."""

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
import transformers
from torch.func import functional_call

import fastbert
from fastbert.testing import assert_within_budget

# The quick loop leaves fp16 out: where bf16 is right it is wrong in range alone.
DTYPES = (torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16)


def one_is_quick(cases: Iterable) -> list:
    """Cases as parameters; the quick loop has the first one."""
    first, *others = cases
    return [first, *(pytest.param(*(case if isinstance(case, tuple) else (case,)),
                                  marks=pytest.mark.slow) for case in others)]  # fmt: skip


# Lengths 9 (full), 4, 1 and 7 of 9.
RIGHT = (torch.arange(9) < torch.tensor([9, 4, 1, 7])[:, None]).long()


def tiny_config(**changes) -> transformers.BertConfig:
    options = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=99,
        max_position_embeddings=40,
        attn_implementation="eager",  # the one that returns attention weights
    )
    return transformers.BertConfig(**{**options, **changes})


def pair(head: str, device: str = "cpu", **changes):
    """transformers' model and ours with the same weights, larger than the usual initialisation."""
    torch.manual_seed(0)
    config = tiny_config(initializer_range=0.3, **changes)
    theirs = getattr(transformers, head)(copy.deepcopy(config)).eval().to(device)
    ours = getattr(fastbert, head)(copy.deepcopy(config)).eval().to(device)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs_for(head: str, mask: torch.Tensor | None, device: str = "cpu") -> dict:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 99, (4, 9), generator=generator)
    types = torch.randint(0, 2, (4, 9), generator=generator)
    inputs = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}
    if head == "BertForMultipleChoice":
        inputs = {k: None if v is None else v.view(2, 2, 9) for k, v in inputs.items()}
    return {k: None if v is None else v.to(device) for k, v in inputs.items()}


def specified_by(model: torch.nn.Module, read: Callable, **inputs) -> tuple[Callable, list]:
    """A model's outputs as a function of its parameters, for `fastbert.testing.assert_matches`.

    Args:
        model: transformers' one; its parameters are the arguments.
        read: output -> the tensors that are compared.
        inputs: of the model; floating-point ones follow the dtype of the parameters.
    """
    # Every name of a weight that is shared, so that nobody need look for it in each call.
    named = dict(model.named_parameters(remove_duplicate=False))
    parameters = list(dict.fromkeys(named.values()))
    place = {parameter: i for i, parameter in enumerate(parameters)}
    places = {name: place[parameter] for name, parameter in named.items()}

    def specification(*given: torch.Tensor) -> list[torch.Tensor]:
        dtype = given[0].dtype
        cast = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in inputs.items()
        }
        weights = {name: given[i] for name, i in places.items()}
        return read(functional_call(model, weights, kwargs=cast, tie_weights=False))

    return specification, [p.detach() for p in parameters]


INPUTS = inputs_for("BertModel", RIGHT)


def assert_as_good(theirs, actual: torch.Tensor, inputs: dict = INPUTS):
    """Outputs by token as exact as transformers' own, which is left as it was."""
    mask = inputs.get("attention_mask")
    real = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    baseline = theirs(**inputs)[0]
    oracle = theirs.double()(**inputs)[0]
    theirs.float()
    assert_within_budget(*(t[real.bool()] for t in (actual, oracle, baseline)), "outputs")
