"""What a model computes from besides its weights: buffers, settings of its attention, positions."""

import pytest
import torch
from tiny import INPUTS, assert_as_good, pair

from fastbert.families.obstacle import obstacle

pytestmark = pytest.mark.usefixtures("on_torch")


@pytest.fixture(autouse=True)
def _inference(monkeypatch):
    monkeypatch.setattr("fastbert.families.obstacle._said", set())
    with torch.no_grad():
        yield


# What stands beside the weights


def grow_positions(model):
    generator = torch.Generator().manual_seed(3)
    model.embeddings.position_embeddings.weight.data = torch.randn(80, 32, generator=generator)


BESIDE = {
    "scaling": lambda m: [setattr(x.attention.self, "scaling", 0.7) for x in m.encoder.layer],
    "positions": lambda m: setattr(m.embeddings, "position_ids", m.embeddings.position_ids + 2),
    "positions in place": lambda m: m.embeddings.position_ids.add_(2),
    "positions by sequence": lambda m: setattr(
        m.embeddings, "position_ids", torch.arange(40).repeat(4, 1) // torch.tensor([[1], [2]] * 2)
    ),
    "token types in place": lambda m: m.embeddings.token_type_ids[:, 3:].fill_(1),
    "no buffer of token types": lambda m: delattr(m.embeddings, "token_type_ids"),
    "a longer table": grow_positions,
}


@pytest.mark.parametrize("change", BESIDE.values(), ids=BESIDE)
def test_what_stands_beside_the_weights_is_read(change):
    """Changed after a call, so that nothing is remembered of what was there."""
    theirs, ours = pair("BertModel")
    inputs = {k: v for k, v in INPUTS.items() if k != "token_type_ids"}
    before = ours(**inputs)[0]
    for model in (theirs, ours):
        change(model)
    for given in (inputs, {"input_ids": inputs["input_ids"]}):
        assert_as_good(theirs, ours(**given)[0], given)
    assert obstacle(ours) is None
    if change is not BESIDE["no buffer of token types"]:  # zeros are what it held
        with pytest.raises(AssertionError, match="over the budget"):
            assert_as_good(theirs, before, inputs)


def test_more_tokens_than_the_config_says_where_the_table_was_enlarged():
    theirs, ours = pair("BertModel")
    ids = INPUTS["input_ids"].repeat(1, 7)[:, :60]
    with pytest.raises(ValueError, match="at most 40 tokens a sequence"):
        ours(input_ids=ids)
    for model in (theirs, ours):
        grow_positions(model)
        model.embeddings.position_ids = torch.arange(80)[None]
        model.embeddings.token_type_ids = torch.zeros(1, 80, dtype=torch.long)
    assert_as_good(theirs, ours(input_ids=ids)[0], {"input_ids": ids})


@pytest.mark.parametrize("name, value", [("is_causal", True), ("scaling", torch.tensor(0.5))])
def test_attention_of_another_kind_is_transformers_business(name, value):
    theirs, ours = pair("BertModel")
    for model in (theirs, ours):
        setattr(model.encoder.layer[1].attention.self, name, value)
    assert_as_good(theirs, ours(**INPUTS)[0])
    assert obstacle(ours) is not None


# Positions


def test_positions_and_types_may_come_for_all_sequences_at_once():
    theirs, ours = pair("BertModel")
    ids = INPUTS["input_ids"]
    for shape in ((9,), (1, 9)):
        inputs = {
            "input_ids": ids,
            "token_type_ids": ids % 2,
            "position_ids": torch.arange(9).flip(0).view(shape),
        }
        assert_as_good(theirs, ours(**inputs)[0], inputs)


def test_positions_that_are_all_zero_are_no_packing(caplog):
    theirs, ours = pair("BertModel")
    inputs = {"input_ids": INPUTS["input_ids"][:1], "position_ids": torch.zeros(1, 9).long()}
    assert_as_good(theirs, ours(**inputs)[0], inputs)
    assert not caplog.records


def test_positions_that_restart_are_packing_where_transformers_takes_them_so(caplog):
    """Its flash attention does, eager and sdpa take one sequence; each is said once."""
    theirs, ours = pair("BertModel")
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    inputs = {"input_ids": INPUTS["input_ids"][:1], "position_ids": positions}
    assert_as_good(theirs, ours(**inputs)[0], inputs)
    ours.config._attn_implementation = "flash_attention_2"
    apart = ours(**inputs)[0]
    ours(**inputs)
    one, packed = (record.message for record in caplog.records)
    assert "2 runs of position_ids" in one and "cu_seq_lens_q" in one
    assert "restart for 2 packed sequences" in packed and "attention_mask of ones" in packed
    alone = ours(input_ids=INPUTS["input_ids"][:1, :4])[0]
    torch.testing.assert_close(apart[:, :4], alone)
    inputs["attention_mask"] = torch.ones(1, 9).long()
    assert_as_good(theirs, ours(**inputs)[0], inputs)
    with pytest.raises(AssertionError, match="over the budget"):
        assert_as_good(theirs, apart, inputs)
