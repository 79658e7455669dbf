"""What outputs hold at padding: zeros, or with ``padding="keep"`` what transformers has there."""

import pytest
import torch
from tiny import INPUTS, RIGHT, inputs_for, pair

import fastbert
from fastbert.families.obstacle import obstacle

REAL = RIGHT.bool()
FLAGS = {"output_hidden_states": True}


def falls_back(model: torch.nn.Module) -> None:
    model.encoder.layer[0].register_forward_hook(lambda *args: None)


def in_chunks(model: torch.nn.Module) -> None:
    for layer in model.encoder.layer:
        layer.chunk_size_feed_forward = 1


@pytest.mark.usefixtures("on_torch")
@pytest.mark.parametrize("change", [None, falls_back, in_chunks], ids=["packed", "hook", "chunks"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_hidden_states_at_padding_are_zeros_on_every_path(change, return_dict):
    theirs, ours = pair("BertModel")
    if change is not None:
        change(ours)
    assert (obstacle(ours) is None) == (change is None)
    with torch.no_grad():
        expected = theirs(**INPUTS, **FLAGS)
        actual = ours(**INPUTS, **FLAGS, return_dict=return_dict)
    last, states = (actual[0], actual[2])
    assert states[-1] is last
    for state, wanted in zip((last, *states), (expected[0], *expected[2]), strict=True):
        assert not state[~REAL].any()
        torch.testing.assert_close(state[REAL], wanted[REAL], atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("on_torch")
def test_hidden_states_by_index_have_zeros_too():
    from transformers.utils import output_capturing

    if not hasattr(output_capturing, "selected_hidden_states"):
        pytest.skip("this transformers has no selection by index")
    _, ours = pair("BertModel")
    with torch.no_grad():
        states = ours(**INPUTS, output_hidden_states=1).hidden_states
    assert not states[1][~REAL].any() and states[1][REAL].any()


@pytest.mark.slow_on_kernels
def test_padding_can_be_computed_as_in_transformers(device, each_backend):
    """Every head, every output, every position; as for ColBERT's masked query tokens."""
    for head in ("BertModel", "BertForMaskedLM", "BertForTokenClassification",
                 "BertForQuestionAnswering"):  # fmt: skip
        theirs, ours = pair(head, device)
        with fastbert.accelerate(ours, padding="keep"), torch.no_grad():
            for mask in (RIGHT, RIGHT.flip(1), None):
                inputs = {**inputs_for(head, mask, device), **FLAGS}
                expected, actual = theirs(**inputs), ours(**inputs)
                assert list(actual) == list(expected)
                for name in expected:
                    torch.testing.assert_close(
                        actual[name], expected[name], atol=1e-4, rtol=1e-4, msg=f"{head} {name}"
                    )
        assert ours.padding == "zeros"


@pytest.mark.usefixtures("on_torch")
def test_kept_padding_has_gradients(device):
    grads = []
    for model in pair("BertModel"):
        if isinstance(model, fastbert.BertModel):
            fastbert.accelerate(model, padding="keep")
        model(**INPUTS).last_hidden_state.mean(1).pow(2).sum().backward()
        grads.append(model.encoder.layer[0].output.dense.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("on_torch")
def test_the_option_is_given_when_a_model_is_made(tmp_path):
    theirs, ours = pair("BertForTokenClassification")
    theirs.save_pretrained(tmp_path)
    kept = fastbert.BertForTokenClassification.from_pretrained(tmp_path, padding="keep").eval()
    assert kept.padding == kept.bert.padding == "keep" and ours.bert.padding == "zeros"
    with torch.no_grad():
        torch.testing.assert_close(kept(**INPUTS).logits, theirs(**INPUTS).logits)
    with pytest.raises(ValueError, match="'zeros' or 'keep', got 'numbers'"):
        fastbert.accelerate(theirs, padding="numbers")
    assert type(theirs.bert) is type(pair("BertModel")[0])  # as it was
