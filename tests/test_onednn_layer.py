"""A layer over a short text as one call: the bits of a layer that is called piece by piece."""

import pytest
import torch
from test_frozen import hidden
from tiny import tiny_config
from torch.profiler import profile

import fastbert
from fastbert import encoder
from fastbert.ops import onednn, onednn_layer

pytestmark = [
    pytest.mark.usefixtures("on_torch"),
    pytest.mark.skipif(
        not onednn.available() or onednn_layer._function("gelu", True, True) is None,
        reason="needs torch's operators of oneDNN, in TorchScript",
    ),
]


@pytest.fixture
def pieces(monkeypatch):
    """Layers that were called piece by piece, and a way to have all of them called so."""
    found, layer = [], encoder._multiply_layer
    monkeypatch.setattr(encoder, "_multiply_layer", lambda *a: found.append(1) or layer(*a))
    return found


def model(frozen: bool, **options) -> fastbert.BertModel:
    torch.manual_seed(0)
    ours = fastbert.BertModel(tiny_config(**options), frozen=frozen).eval()
    for name, parameter in ours.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return ours


def text(length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 99, (1, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids}


def in_pieces(of: torch.nn.Module, inputs, monkeypatch) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(onednn_layer, "UP_TO", 0)
        return hidden(of, inputs)


@pytest.mark.parametrize("length", [1, 7, 8, 33, 64])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_at_once_has_the_same_bits(frozen, length, pieces, monkeypatch):
    ours, inputs = model(frozen, max_position_embeddings=64), text(length)
    found = hidden(ours, inputs)
    assert not pieces
    assert torch.equal(found, in_pieces(ours, inputs, monkeypatch))
    assert len(pieces) == len(ours.encoder.layer)


def without_norms(ours: torch.nn.Module) -> None:
    for layer in ours.encoder.layer:
        layer.output.LayerNorm = torch.nn.LayerNorm(32, elementwise_affine=False)


def without_biases(ours: torch.nn.Module) -> None:
    for layer in ours.encoder.layer:
        for linear in (layer.attention.self.key, layer.output.dense, layer.intermediate.dense):
            linear.bias = None


def another_scale(ours: torch.nn.Module) -> None:
    ours.encoder.layer[1].attention.self.scaling = 2.0


def another_activation(ours: torch.nn.Module) -> None:
    ours.encoder.layer[1].intermediate.intermediate_act_fn = torch.nn.ReLU()


@pytest.mark.parametrize(
    "change", [without_norms, without_biases, another_scale, another_activation]
)
@pytest.mark.parametrize("frozen", [False, True])
def test_layers_of_another_make_have_the_same_bits(frozen, change, pieces, monkeypatch):
    ours, inputs = model(frozen), text(6)
    before = hidden(ours, inputs)
    with torch.no_grad():
        change(ours)
    found = hidden(ours, inputs)
    assert not pieces and not torch.equal(found, before)
    assert torch.equal(found, in_pieces(ours, inputs, monkeypatch))


OTHERS = {
    "two texts": (lambda: model(True), 2, torch.float32),
    "an activation without an epilogue": (lambda: model(True, hidden_act="silu"), 1, torch.float32),
    "bf16": (lambda: model(True).bfloat16(), 1, torch.bfloat16),
}


@pytest.mark.parametrize(("make", "texts", "dtype"), OTHERS.values(), ids=OTHERS)
def test_other_calls_are_made_in_pieces(make, texts, dtype, pieces):
    if not onednn.available(dtype):
        pytest.skip(f"oneDNN has no products in {dtype} here")
    ours = make()
    hidden(ours, {"input_ids": text(6)["input_ids"].expand(texts, -1)})
    assert len(pieces) == len(ours.encoder.layer)


@pytest.mark.parametrize(("rows", "expected"), [(8, 0), (7, 2)])
def test_longer_texts_are_computed_in_pieces(rows, expected, pieces, monkeypatch):
    monkeypatch.setattr(onednn_layer, "UP_TO", rows)
    hidden(model(True), text(6))  # of eight rows
    assert len(pieces) == expected


ELSEWHERE = {
    "no such language": lambda patch: patch.delattr(torch._C, "parse_ir"),
    "no such operator": lambda patch: patch.setattr(onednn_layer, "_PRODUCT", "mkldnn::_other"),
    "other arguments": lambda patch: patch.setattr(
        onednn_layer, "_GRAPH", onednn_layer._GRAPH.replace("%none, %numbers, ", "%none, ")
    ),
    "another result": lambda patch: patch.setattr(
        onednn_layer, "_GRAPH", onednn_layer._GRAPH.replace("%mixed, %hidden", "%mixed, %context")
    ),
}


@pytest.mark.parametrize("differs", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_torch_that_computes_something_else_goes_without(differs, pieces, monkeypatch):
    ours, inputs = model(True), text(6)
    expected = hidden(ours, inputs)
    assert not pieces
    onednn_layer._function.cache_clear()
    differs(monkeypatch)
    try:
        assert torch.equal(hidden(ours, inputs), expected) and pieces
    finally:
        onednn_layer._function.cache_clear()


def test_a_profile_shows_what_is_called():
    ours, inputs = model(True), text(6)
    hidden(ours, inputs)
    with profile() as seen:
        hidden(ours, inputs)
    names = [event.name for event in seen.events()]
    assert names.count("mkldnn::_linear_pointwise") == 4 * len(ours.encoder.layer)
    # Nor is anything looked for or made that a call of the same size has found or made before.
    assert not {"aten::aminmax", "aten::arange", "aten::item"} & set(names)
