"""What is wrong with an input is said in words, on the path with gradients and the one without."""

import pytest
import torch
from tiny import RIGHT, inputs_for, pair

pytestmark = pytest.mark.usefixtures("on_torch")
INPUTS = inputs_for("BertModel", RIGHT)
REAL = RIGHT.bool()

BAD = {
    "mask of another shape": (
        {"attention_mask": RIGHT[:, :5]}, ValueError, r"\(4, 9\), got \(4, 5\)"
    ),
    "mask of three dimensions": (
        {"attention_mask": RIGHT[:, None]}, ValueError, r"mask\[:, None\]"
    ),
    "integer mask per query": (
        {"attention_mask": torch.ones(4, 1, 9, 9, dtype=torch.long)}, ValueError, "floating point"
    ),
    "id out of range": ({"input_ids": INPUTS["input_ids"] + 90}, ValueError, "from 0 to 98"),
    "negative id": ({"input_ids": -INPUTS["input_ids"]}, ValueError, "from 0 to 98"),
    "type out of range": ({"token_type_ids": RIGHT + 1}, ValueError, "from 0 to 1"),
    "position out of range": ({"position_ids": RIGHT + 39}, ValueError, "from 0 to 39"),
    "types of another shape": ({"token_type_ids": RIGHT[:, :5]}, ValueError, "token_type_ids"),
    "types of half the batch": (
        {"token_type_ids": RIGHT[:2]}, RuntimeError, r"token_type_ids \(4, 9\), got \(2, 9\)"
    ),
    "positions of half the batch": (
        {"position_ids": RIGHT[:2]}, RuntimeError, r"position_ids \(4, 9\), got \(2, 9\)"
    ),
    "floating ids": ({"input_ids": INPUTS["input_ids"].float()}, TypeError, "int32 or int64"),
    "one dimension": ({"input_ids": torch.arange(9)}, ValueError, r"\[batch, length\]"),
    "empty batch": ({"input_ids": INPUTS["input_ids"][:0]}, ValueError, "at least one token"),
    "too long": (
        {"input_ids": torch.ones(1, 41, dtype=torch.long)}, ValueError, "at most 40 tokens.*got 41"
    ),
    "nothing": ({"input_ids": None}, ValueError, "exactly one of"),
    "both": ({"inputs_embeds": torch.zeros(4, 9, 32)}, ValueError, "exactly one of"),
    "another device": ({"input_ids": INPUTS["input_ids"].to("meta")}, ValueError, "got meta"),
}  # fmt: skip


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name, grad):
    changes, error, message = BAD[name]
    _, ours = pair("BertModel")
    inputs = {"input_ids": INPUTS["input_ids"], **changes}
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        ours(**inputs)


LABELS = {
    "half the batch": (RIGHT[:2], "(18)"),
    "one a sequence": (RIGHT[:, 0], "(4)"),
    "shorter": (RIGHT[:, :5], "(20)"),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("labels, count", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize(
    "head", ["BertForMaskedLM", "BertForPreTraining", "BertForTokenClassification"]
)
def test_labels_that_are_not_one_a_token_are_named(head, labels, count, training):
    """As transformers has it; both sizes in the message."""
    more = {"next_sentence_label": torch.tensor([0, 1, 0, 1])} if "Pre" in head else {}
    for model in pair(head):
        with pytest.raises(ValueError) as caught:
            model.train(training)(**INPUTS, labels=labels % 2, **more)
        assert f"batch_size (36) to match target batch_size {count}" in str(caught.value)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertForTokenClassification"])
def test_labels_may_come_flat_as_in_transformers(head, training):
    theirs, ours = pair(head, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    labels = (INPUTS["input_ids"] % 2).masked_fill(~REAL, -100)
    for given in (labels, labels.flatten()):
        losses = [m.train(training)(**INPUTS, labels=given).loss for m in (theirs, ours)]
        torch.testing.assert_close(*losses)


@torch.no_grad()
def test_nan_weights_pass_through():
    theirs, ours = pair("BertModel")
    for model in (theirs, ours):
        model.encoder.layer[0].output.dense.weight[3, 3] = float("nan")
    expected, actual = theirs(**INPUTS)[0][REAL], ours(**INPUTS)[0][REAL]
    assert torch.equal(actual.isnan(), expected.isnan()) and actual.isnan().any()


@torch.no_grad()
def test_an_all_padding_row_gives_zeros():
    _, ours = pair("BertModel")
    mask = RIGHT.clone()
    mask[1] = 0
    output = ours(INPUTS["input_ids"], mask)
    assert not output[0][1].any() and output[0].isfinite().all()
    assert not ours(INPUTS["input_ids"], torch.zeros_like(mask))[0].any()
