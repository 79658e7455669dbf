"""``frozen="int8"``: products of integers are exact, rows are by themselves, and it is never used
where it was not asked for or cannot be."""

import copy
import logging
import pickle

import pytest
import torch
from test_frozen import LENGTHS, batch_of, copied, hidden, of_layers
from tiny import tiny_config
from torch import nn

import fastbert
from fastbert.families import registry
from fastbert.ops import onednn_int8

pytestmark = [
    pytest.mark.usefixtures("on_torch"),
    pytest.mark.skipif(not onednn_int8.available(), reason="needs torch's int8 products of oneDNN"),
]


def frozen(**options) -> fastbert.BertModel:
    torch.manual_seed(0)
    return fastbert.BertModel(tiny_config(**options), frozen="int8").eval()


@pytest.mark.parametrize("levels", [127, 255])
@pytest.mark.parametrize("shape", [(1, 8, 16), (7, 384, 1536), (33, 100, 72), (200, 64, 5)])
def test_products_are_those_of_the_nearest_integers(shape, levels, monkeypatch):
    """255 levels are for CPUs that hold their sums; small weights keep them from overflowing."""
    rows, inner, outer = shape
    x = torch.randn(rows, inner) * torch.logspace(-3, 3, rows)[:, None] + torch.randn(rows, 1)
    weight, bias = torch.randn(outer, inner), torch.randn(outer)
    weight[0], x[-1] = 0.0, 1.5
    if levels == 255:
        weight = weight.clamp(-0.4, 0.4)
        weight[:, 0], weight[:, 1] = 1.0, 0.0
    monkeypatch.setattr(onednn_int8, "_levels", lambda: levels)
    integers, step, low = (t.double() for t in onednn_int8._integers_of(x, levels))
    off = (x - low) / step - integers
    assert off.abs().max() < 0.5 + 1e-3 and integers.min() == 0 and integers.max() <= levels
    assert (integers.amax(1)[:-1] == levels).all(), "all levels are used"
    scales = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    exact = (integers * step + low) @ ((weight / scales).round() * scales).double().T + bias
    found = onednn_int8.product(x, onednn_int8.packed(weight), bias, None)
    terms = x.abs().amax(1, keepdim=True) * weight.abs().sum(1) + bias.abs()
    assert ((found - exact).abs() <= 1e-6 * terms).all()
    residual = torch.randn(rows, outer)
    added = onednn_int8.product_add(x, onednn_int8.packed(weight), bias, residual)
    assert torch.equal(added, found + residual)
    for activation in ("gelu", "relu"):
        active = onednn_int8.product(x, onednn_int8.packed(weight), bias, activation)
        assert torch.equal(active, getattr(nn.functional, activation)(found))


def test_a_row_is_by_itself():
    """Bit for bit, whatever other rows there are: nobody's scale is anybody else's."""
    x = torch.randn(64, 96) * torch.logspace(-3, 3, 64)[:, None]
    weight = onednn_int8.packed(torch.randn(40, 96))
    together = onednn_int8.product(x, weight, None, None)
    for rows in (slice(0, 1), slice(63, 64), slice(5, 40)):
        assert torch.equal(together[rows], onednn_int8.product(x[rows], weight, None, None))


def test_sums_that_overflow_16_bits_are_right():
    """Whatever instructions this CPU has: all rows and weights at their largest."""
    x = torch.ones(4, 512)
    x[:, 0] = 0.0
    found = onednn_int8.product(x, onednn_int8.packed(torch.ones(32, 512)), None, None)
    assert torch.allclose(found, torch.full((4, 32), 511.0), rtol=1e-6)


def test_operators_that_compute_something_else_are_found_out(monkeypatch):
    multiply = onednn_int8._multiply
    monkeypatch.setattr(onednn_int8, "_multiply", lambda x, w: multiply(x, w).clamp_max(32767 * 2))
    assert not onednn_int8._is_exact(255)
    monkeypatch.setattr(onednn_int8, "available", lambda: False)
    with pytest.raises(ValueError, match="no products in int8"):
        frozen()


@pytest.mark.parametrize("around", ["autocast", "fp64", "meta"])
def test_they_are_tried_the_same_whatever_surrounds_the_first_use(around):
    if around == "fp64":
        torch.set_default_dtype(torch.float64)
    try:
        with (
            torch.device("meta" if around == "meta" else "cpu"),
            torch.autocast("cpu", torch.bfloat16, enabled=around == "autocast"),
        ):
            assert onednn_int8._is_exact(127)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu", "silu"])
def test_every_batch_is_near_the_model_and_a_sequence_near_itself_alone(activation):
    """Whatever else is in the batch and how far rows are rounded up. Attention, in fp32, rounds
    otherwise in another batch, which may move an integer by one."""
    model = frozen(hidden_act=activation)
    for lengths in LENGTHS:
        inputs = batch_of(lengths)
        together = hidden(model, inputs)
        assert copied(model)
        for i, length in enumerate(lengths):
            if length:
                alone = {name: t[i : i + 1, :length] for name, t in inputs.items()}
                expected = hidden(model, alone)[0]
                assert torch.cosine_similarity(together[i, :length], expected).min() > 0.999
        found, exact = (t[inputs["attention_mask"].bool()] for t in
                        (together, of_layers(model, inputs)))  # fmt: skip
        assert torch.cosine_similarity(found, exact).min() > 0.995
        assert not torch.equal(found, exact)


@pytest.mark.parametrize("family", ["mpnet", "distilbert", "albert", "roberta-prelayernorm"])
def test_other_families(family):
    torch.manual_seed(0)
    kinds = registry.load(family)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64,
             "num_hidden_layers": 2, "vocab_size": 99, "embedding_size": 32}  # fmt: skip
    if family == "distilbert":
        sizes = {"dim": 32, "n_heads": 4, "hidden_dim": 64, "n_layers": 2, "vocab_size": 99}
    model = getattr(fastbert, kinds.model.__name__)(kinds.config(**sizes), frozen="int8").eval()
    inputs = batch_of([9, 4, 1, 7])
    found, exact = (
        t[inputs["attention_mask"].bool()]
        for t in (hidden(model, inputs), of_layers(model, inputs))
    )
    assert copied(model) and torch.cosine_similarity(found, exact).min() > 0.99


def test_memory_and_changes(minilm_folder):
    model = fastbert.BertModel.from_pretrained(minilm_folder, frozen="int8").eval()
    inputs = batch_of([64, 3, 17])
    before = hidden(model, inputs)
    assert 10.6e6 < model.frozen.nbytes < 11.3e6
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(2)
    after = hidden(model, inputs)
    assert (after - before).abs().max() > 0.01
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.div_(2)
    assert torch.equal(hidden(model, inputs), before)


def test_copies_of_a_model_are_in_int8_too():
    model = frozen()
    expected = hidden(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(hidden(other), expected) and copied(other)


def test_undone_it_is_what_it_was():
    torch.manual_seed(0)
    model = fastbert.BertModel(tiny_config()).eval()
    exact = hidden(model)
    with fastbert.accelerate(model, frozen="int8"):
        assert not torch.equal(hidden(model), exact)
    assert torch.equal(hidden(model), exact)


def test_where_it_has_no_effect_it_says_so_once(caplog):
    model = frozen().to(torch.bfloat16)
    with caplog.at_level(logging.WARNING, "fastbert"):
        hidden(model), hidden(model)
    assert ["frozen='int8' has no effect" in m for m in caplog.messages] == [True]
    assert not copied(model)
    model.float()
    hidden(model)
    assert copied(model)


@pytest.mark.parametrize("wrong", ["int4", "fp8", 2])
def test_another_form_is_refused_before_anything_is_set(wrong):
    model = fastbert.BertModel(tiny_config())
    with pytest.raises(ValueError, match="frozen: expected True, False or 'int8', got"):
        fastbert.accelerate(model, padding="keep", frozen=wrong)
    assert model.padding == "zeros" and model.frozen is None


@pytest.mark.slow
def test_embeddings_of_a_real_model(minilm_folder):
    """What README says of them."""
    from sentence_transformers import SentenceTransformer

    from fastbert.demo import passages

    texts = [passage["text"] for passage in passages()]
    model = SentenceTransformer(str(minilm_folder), device="cpu")
    exact = model.encode(texts, convert_to_tensor=True)
    with fastbert.accelerate(model, frozen="int8"):
        found = model.encode(texts, convert_to_tensor=True)
    assert torch.cosine_similarity(found, exact).min() > 0.99


@pytest.mark.slow
def test_it_is_compared_behind_a_check(monkeypatch, capsys):
    from fastbert.benchmarks import int8

    monkeypatch.setattr(int8, "_quantised_session", lambda encoders: int8._ours(encoders, True))
    monkeypatch.setattr("sys.argv", ["int8", "--model", "tiny", "--rounds", "1"])
    int8.main()
    rows = [
        line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "tiny" in line
    ]
    assert len(rows) == 5 and rows[-1][0].strip() == "tiny B8 S128, ragged"
    assert all(0.99 < float(row[5]) < 1.00001 for row in rows)
    made = int8._ours

    def wrong(encoders, frozen):
        run = made(encoders, frozen)
        return (lambda x: run(x).flip(-1)) if frozen is True else run

    monkeypatch.setattr(int8, "_ours", wrong)
    with pytest.raises(AssertionError, match="a cosine of"):
        int8.main()
