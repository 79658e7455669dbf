"""oneDNN's products, and attention by products: what layers on a CPU are made of."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from test_families import pair_of
from test_frozen import batch_of, hidden
from tiny import pair, tiny_config
from torch.utils.flop_counter import FlopCounterMode

import fastbert
from fastbert import ops
from fastbert.families import registry
from fastbert.frozen import Frozen
from fastbert.ops import attention_torch, onednn, onednn_attention, onednn_layer
from fastbert.ops.reference import attention_varlen_ref
from fastbert.packing import PackedBatch
from fastbert.testing import assert_matches, assert_within_budget

pytestmark = [
    pytest.mark.usefixtures("on_torch"),
    pytest.mark.skipif(not onednn.available(), reason="needs torch's operators of oneDNN"),
]


@pytest.mark.parametrize("rows", [9, 64, 65, 300])
@pytest.mark.parametrize("apart_from", [65, math.inf], ids=["apart", "fused"])
def test_a_gelu_is_as_exact_in_the_product_as_behind_it(monkeypatch, apart_from, rows):
    monkeypatch.setattr(onednn, "GELU_APART_FROM", apart_from)
    behind = []
    monkeypatch.setattr(onednn, "_GELU_", lambda total: behind.append(len(total)) or F.gelu(total))
    x, weight, bias = torch.randn(rows, 48), torch.randn(80, 48), torch.randn(80)
    for form in (weight, onednn.packed(weight)):
        found = onednn.product(x, form, bias, "gelu")
        assert_matches(found, lambda *parts: F.gelu(F.linear(*parts)), (x, weight, bias), "gelu")
    assert behind == [rows] * (2 * (rows >= apart_from))


def multiplied(monkeypatch) -> list[int]:
    """Lengths of the sequences that attend by products from now on."""
    multiply, lengths = torch.baddbmm, []
    monkeypatch.setattr(torch, "baddbmm", lambda scores, q, *rest, **options: (
        lengths.append(q.shape[1]) or multiply(scores, q, *rest, **options)))  # fmt: skip
    return lengths


@pytest.mark.parametrize("alone", [True, False], ids=["products", "SDPA"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_sequences_are_as_exact_by_products(monkeypatch, biased, alone):
    lengths = [7, 1, 192, 193, 4, 4, 0, 33, 513]
    batch = PackedBatch.from_lengths(lengths)
    q, k, v = torch.randn(sum(lengths), 3, 2, 16).unbind(1)
    bias = torch.randn(2, 513, 513) if biased else None
    monkeypatch.setattr(onednn_attention, "available", lambda: False)
    taken = multiplied(monkeypatch)
    options = {"scale": 0.3, "dropout_p": 0.0, "unfused": False, "one_by_one": alone}
    found = attention_torch.varlen_in_torch(q, k, v, batch, batch, bias=bias, **options)
    expected = [7, 1, 192, 193, 4, 4, 33] if biased else [7, 1, 192, 33]
    assert taken == (expected if alone else [])
    monkeypatch.undo()

    def specification(q, k, v, bias):
        return attention_varlen_ref(q, k, v, lengths, lengths, 0.3, bias=bias)

    assert_matches(found, specification, (q, k, v, bias), "attention")


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "as they are"])
@pytest.mark.parametrize(
    ("family", "lengths", "expected"),
    [("bert", [9, 4, 4, 7], [9, 7]), ("bert", [9], [9]), ("bert", [0, 9], [9]),
     ("bert", [9, 9], []), ("mpnet", [9, 4, 4, 7], [9, 4, 4, 7]), ("mpnet", [9], [9]),
     ("mpnet", [9, 9], [9, 9])],
)  # fmt: skip
def test_layers_attend_by_products_where_that_is_a_gain(
    family, lengths, expected, frozen, monkeypatch
):
    alone = multiplied(monkeypatch)
    monkeypatch.setattr(onednn_layer, "UP_TO", 0)  # a layer piece by piece
    if family == "bert":
        theirs, ours = pair("BertModel")
    else:
        theirs, ours = pair_of(family, registry.load(family).model.__name__)
    ours.frozen = Frozen() if frozen else None
    inputs = batch_of(lengths)
    found = hidden(ours, inputs)
    assert alone == expected * 2
    real = inputs["attention_mask"].bool()
    exact = hidden(copy.deepcopy(theirs).double(), inputs)[real]
    assert_within_budget(found[real], exact, hidden(theirs, inputs)[real], family)


def _gradients(function, tensors):
    tensors = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*tensors).pow(2).sum(), tensors)


@pytest.mark.parametrize("shape", [(33,), (3, 11), (1,)], ids=str)
@pytest.mark.parametrize("name", ["linear", "cross entropy"])
def test_gradients_of_large_weights_are_as_exact(name, shape, monkeypatch):
    """They are oneDNN's; here all are large."""
    monkeypatch.setattr(onednn, "WEIGHT_GRADIENT_FROM", 0)
    multiply, taken = onednn.multiply, []
    monkeypatch.setattr(onednn, "multiply", lambda *ab: taken.append(ab) or multiply(*ab))
    tensors = torch.randn(*shape, 64), torch.randn(48, 64), torch.randn(48)
    labels = torch.randint(48, shape).flatten()

    def ours(x, weight, bias):
        if name == "linear":
            return ops.linear(x, weight, bias)
        return ops.linear_cross_entropy(x.flatten(0, -2), weight, bias, labels)

    def theirs(x, weight, bias):
        logits = F.linear(x, weight, bias)
        return logits if name == "linear" else F.cross_entropy(logits.flatten(0, -2), labels)

    actual = _gradients(ours, tensors)
    assert len(taken) == 1 and all(g.shape == t.shape for g, t in zip(actual, tensors, strict=True))
    for i, gradient in enumerate(actual):
        assert_matches(gradient, lambda *t, i=i: _gradients(theirs, t)[i], tensors, f"gradient {i}")


def test_the_gradient_of_a_large_weight_has_a_derivative(monkeypatch):
    monkeypatch.setattr(onednn, "WEIGHT_GRADIENT_FROM", 0)

    def second(function, tensors):
        x, weight = (t.detach().requires_grad_() for t in tensors)
        (first,) = torch.autograd.grad(function(x, weight).pow(2).sum(), weight, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), (x, weight))

    tensors = torch.randn(5, 16), torch.randn(8, 16)
    assert_matches(second(ops.linear, tensors), lambda *t: second(F.linear, t), tensors, "second")


def test_operators_that_compute_something_else_are_found_out(monkeypatch):
    for name, wrong in (
        ("product", lambda x, weight, bias, activation: x @ weight.t()),
        ("packed", lambda weight: 1 / 0),
        ("product_add", None),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(onednn, "_known", {})
            patch.setattr(onednn, name, wrong)
            if name == "packed":
                with pytest.raises(ZeroDivisionError):  # of our own making: not swallowed
                    onednn.available()
            else:
                assert not onednn.available()
    assert onednn.available()


@pytest.mark.parametrize("surroundings", ["autocast", "fp64", "meta", "flops"])
def test_operators_are_tried_the_same_whatever_surrounds_the_first_call(surroundings, monkeypatch):
    """The trial is part of somebody's first call, and of nothing that he has set up around it."""
    monkeypatch.setattr(onednn, "_known", {})
    weight, x = torch.randn(16, 32), torch.randn(5, 32)
    expected = torch.nn.functional.linear(x, weight)
    if surroundings == "fp64":
        torch.set_default_dtype(torch.float64)
    around = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "fp64": nullcontext,
        "meta": lambda: torch.device("meta"),
        "flops": lambda: FlopCounterMode(display=False),
    }[surroundings]
    try:
        with around() as watching, torch.no_grad():
            found = ops.linear(x, weight)
            if surroundings == "autocast":
                fastbert.BertModel(tiny_config()).eval()(torch.tensor([[1, 2, 3]]))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.allclose(found.float(), expected, atol=1e-4 if surroundings != "autocast" else 0.1)
    if surroundings == "flops":
        assert watching.get_total_flops() == 2 * 5 * 16 * 32
    assert onednn.available()
