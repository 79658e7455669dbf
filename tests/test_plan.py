"""Weights of layers that were read once are never taken for those that a layer has now.

A copy of a model has read nothing yet, so it says what the layers compute as they are.
"""

import copy

import pytest
import torch
import transformers
from test_families import inputs_of, pair_of
from tiny import INPUTS, RIGHT, assert_as_good, one_is_quick, tiny_config
from torch import nn

import fastbert
from fastbert.families import plan


def model(device: str = "cpu", **options) -> fastbert.BertModel:
    torch.manual_seed(0)
    return fastbert.BertModel(tiny_config(**options)).eval().to(device)


def call(of: nn.Module, **options):
    return of(**{name: t.to(of.device) for name, t in INPUTS.items()}, **options)


def hidden(of: nn.Module, **options) -> torch.Tensor:
    with torch.no_grad():
        return call(of, **options).last_hidden_state


@pytest.fixture
def on_kernels(device):
    """Where the kernels run, with everything new made there."""
    pytest.importorskip("triton")
    with fastbert.backend("triton"), torch.device(device):
        yield device


def scaled(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight * 3)


CHANGES = {
    "a parameter": lambda layer: scaled(layer.attention.self.query),
    "a parameter's data": lambda layer: setattr(
        layer.output.dense.weight, "data", layer.output.dense.weight.data * 3
    ),
    "a value in place": lambda layer: layer.output.dense.weight.data.mul_(3),
    "a bias": lambda layer: setattr(
        layer.intermediate.dense, "bias", nn.Parameter(torch.randn(64))
    ),
    "all parameters of a module": lambda layer: setattr(
        layer.output.dense,
        "_parameters",
        {n: nn.Parameter(p * 3) for n, p in layer.output.dense._parameters.items()},
    ),
    "a module": lambda layer: setattr(layer.output, "dense", nn.Linear(64, 32)),
    "the scale": lambda layer: setattr(layer.attention.self, "scaling", 9.0),
    "an eps": lambda layer: setattr(layer.output.LayerNorm, "eps", 0.5),
    "the activation": lambda layer: setattr(layer.intermediate, "intermediate_act_fn", nn.ReLU()),
    "dropout": lambda layer: layer.output.dropout.train(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_a_layer_computes_with_may_change(change):
    ours = model()
    before = hidden(ours)
    with torch.no_grad():
        change(ours.encoder.layer[1])
    torch.manual_seed(1)
    now = hidden(ours)
    torch.manual_seed(1)
    assert torch.equal(now, hidden(copy.deepcopy(ours)))
    assert not torch.allclose(now, before), "the change changes nothing"


def no_longer_plain(embeddings: nn.Module) -> None:
    embeddings.word_embeddings.max_norm = 0.01


OF_EMBEDDINGS = {
    "words": lambda e: setattr(
        e.word_embeddings, "weight", nn.Parameter(e.word_embeddings.weight * 3)
    ),
    "a table": lambda e: setattr(e, "position_embeddings", nn.Embedding(64, 32)),
    "a value in place": lambda e: e.token_type_embeddings.weight.data.mul_(300),
    "a norm's bias": lambda e: setattr(e.LayerNorm, "bias", nn.Parameter(torch.randn(32))),
    "a norm": lambda e: setattr(e, "LayerNorm", nn.RMSNorm(32)),
    "an eps": lambda e: setattr(e.LayerNorm, "eps", 0.5),
    "dropout": lambda e: e.dropout.train(),
    "a table's rule": no_longer_plain,
}


@pytest.mark.parametrize("change", OF_EMBEDDINGS.values(), ids=OF_EMBEDDINGS)
def test_whatever_embeddings_compute_with_may_change(change):
    ours = model()
    before = hidden(ours)
    with torch.no_grad():
        change(ours.embeddings)
    other = copy.deepcopy(ours)
    torch.manual_seed(1)
    now = hidden(ours)
    torch.manual_seed(1)
    assert torch.equal(now, hidden(other))
    assert not torch.allclose(now, before), "the change changes nothing"


def test_embeddings_are_read_once(monkeypatch):
    found, read = [], plan.read_sums
    for module in (plan, fastbert.families.model):
        monkeypatch.setattr(module, "read_sums", lambda model: found.append(model) or read(model))
    ours = model()
    for _ in range(3):
        hidden(ours)
    assert found == [ours]
    ours.embeddings.LayerNorm = nn.RMSNorm(32)  # no op takes it
    for _ in range(3):
        hidden(ours)
    assert len(found) == 1 + 1 + 3


@pytest.fixture
def reads(monkeypatch) -> list[nn.Module]:
    """The layers whose weights are read, one after the other."""
    found, read = [], fastbert.families.model._layer_weights
    monkeypatch.setattr(
        fastbert.families.model, "_layer_weights", lambda layer: found.append(layer) or read(layer)
    )
    return found


@pytest.fixture
def calls(monkeypatch) -> list[nn.Module]:
    """The layers that are called, one after the other."""
    found, layer = [], type(model().encoder.layer[0])
    theirs = layer.__call__
    monkeypatch.setattr(
        layer, "__call__", lambda self, *a, **k: found.append(self) or theirs(self, *a, **k)
    )
    return found


def gradients(of: nn.Module, **options) -> list[torch.Tensor | None]:
    of.zero_grad()
    torch.manual_seed(1)
    call(of, **options).last_hidden_state.square().sum().backward()
    return [p.grad for p in of.parameters()]


FROZEN = {
    "frozen": lambda layer: layer.attention.self.requires_grad_(False),
    "a query alone": lambda layer: layer.attention.self.query.requires_grad_(False),
    "a norm alone": lambda layer: layer.attention.output.LayerNorm.requires_grad_(False),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", [*CHANGES.values(), *FROZEN.values()], ids=[*CHANGES, *FROZEN])
def test_whatever_a_layer_trains_with_may_change(change, on_kernels):
    ours = model(on_kernels)
    gradients(ours)
    with torch.no_grad():
        change(ours.encoder.layer[1])
    found, expected = gradients(ours), gradients(copy.deepcopy(ours))
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("grad", [False, True])
def test_a_weight_that_is_no_parameter_may_be_another_in_every_call(grad):
    """As a network has it whose weights another one makes."""
    ours = model()
    dense = ours.encoder.layer[1].output.dense
    weight = dense.weight.detach()
    del dense.weight
    found = []
    for factor in (1, 3):
        dense.weight = weight * factor
        with torch.set_grad_enabled(grad):
            found.append(call(ours).last_hidden_state.detach())
            alone = call(copy.deepcopy(ours)).last_hidden_state.detach()
        assert torch.equal(found[-1], alone)
    assert not torch.allclose(*found)


@pytest.mark.parametrize("grad", [False, True])
def test_weights_that_a_known_hook_brings_are_read_behind_it(grad):
    """As FSDP does: a layer has its weights while it is called, and others before."""
    ours = model()
    layer = ours.encoder.layer[1]
    dense, whole = layer.output.dense, layer.output.dense.weight

    def bring(module, args):
        dense.weight = whole

    def take(module, args, output):
        dense.weight = nn.Parameter(torch.zeros_like(whole))

    with torch.set_grad_enabled(grad):
        expected = call(ours).last_hidden_state
        bring.__module__ = take.__module__ = "torch.distributed.fsdp"
        layer.register_forward_pre_hook(bring)
        layer.register_forward_hook(take)
        take(None, None, None)
        for _ in range(2):
            assert torch.equal(call(ours).last_hidden_state, expected)


@pytest.mark.slow
def test_layers_are_read_once_in_training(reads, calls):
    ours = model().train()
    gradients(ours), gradients(ours)
    assert len(reads) == 2 and calls == []
    ours.encoder.layer[0].attention.self.query.requires_grad_(False)
    gradients(ours)
    assert len(reads) == 4, "which products are one may have changed"
    hidden(ours), gradients(ours)
    assert len(reads) == 6, "inference has a reading of its own"
    scaled(ours.encoder.layer[0].output.dense)
    gradients(ours)
    assert len(reads) == 8 and "_fastbert_plan" not in vars(ours), "it held the old weight"
    hidden(ours)
    twin = copy.deepcopy(ours)  # which has read nothing
    hidden(twin), gradients(twin)
    assert len(reads) == 14
    ours.encoder.layer[1].output.register_forward_hook(lambda *a: None)
    gradients(ours)
    assert len(reads) == 14, "transformers' code runs"


def test_layers_are_called_that_backward_computes_again(calls):
    ours = model().train()
    expected = gradients(ours)
    getattr(ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable)()
    for one, other in zip(gradients(ours), expected, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert set(calls) == set(ours.encoder.layer)


ALIKE_OR_NOT = [None, "a bias", "a module", "the scale", "an eps", "the activation"]


@pytest.mark.parametrize("change", one_is_quick([*ALIKE_OR_NOT, "dropout", *FROZEN]))
def test_kernels_are_launched_for_each_layer_as_for_it_alone_in_training(change, on_kernels):
    """Forward and backward; who asks for hidden states has each layer called by itself."""
    ours = model(on_kernels, num_hidden_layers=3).train()
    if change is not None:
        {**CHANGES, **FROZEN, "dropout": lambda layer: layer.eval()}[change](ours.encoder.layer[1])
    found, expected = gradients(ours), gradients(ours, output_hidden_states=True)
    assert sum(g is not None for g in found) > 45
    for one, other in zip(found, expected, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["the last layer", "biases", "norms", "the input"])
def test_a_layer_of_which_little_is_trained_is_trained_as_it_is_alone(trained, on_kernels):
    ours = model(on_kernels, num_hidden_layers=3).train().requires_grad_(trained == "the input")
    ours.embeddings.requires_grad_(trained == "the input")
    if trained == "the last layer":
        ours.encoder.layer[2].requires_grad_(True)
    for name, parameter in ours.named_parameters():
        if trained == "biases" and name.endswith("bias"):
            parameter.requires_grad_(True)
        if trained == "norms" and "layer.1" in name and "LayerNorm" in name:
            parameter.requires_grad_(True)
        if trained == "the input" and "encoder" in name:
            parameter.requires_grad_(False)
    found, expected = gradients(ours), gradients(ours, output_hidden_states=True)
    assert any(g is not None for g in found)
    for p, one, other in zip(ours.parameters(), found, expected, strict=True):
        assert (one is None) == (other is None) == (not p.requires_grad or one is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("change", ALIKE_OR_NOT)
def test_kernels_are_launched_for_each_layer_as_for_it_alone(change, on_kernels):
    """Layers that are alike share launches and the memory of results; others must not."""
    ours = model(on_kernels, num_hidden_layers=4)
    if change is not None:
        CHANGES[change](ours.encoder.layer[2])
    assert torch.equal(hidden(ours), hidden(ours, output_hidden_states=True))


def mpnet() -> fastbert.MPNetModel:
    """Its layers add a bias to the scores."""
    config = transformers.MPNetConfig(**tiny_config(num_hidden_layers=3).to_dict())
    return fastbert.MPNetModel(config)


def count(monkeypatch, name: str) -> list[tuple]:
    """The arguments of every call of a function by the encoder."""
    from fastbert import encoder

    taken, called = [], getattr(encoder, name)
    monkeypatch.setattr(encoder, name, lambda *a, **k: taken.append(a) or called(*a, **k))
    return taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_are_launched_for_each_layer_with_a_bias_of_the_scores(
    dtype, on_kernels, monkeypatch
):
    taken = count(monkeypatch, "_launch_layers")
    ours = mpnet().eval().to(dtype)
    inputs = {name: INPUTS[name].to(on_kernels) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        together = ours(**inputs).last_hidden_state
        assert len(taken) == 1 and taken[0][1].bias.dtype == dtype
        alone = ours(**inputs, output_hidden_states=True).last_hidden_state
    assert torch.equal(together, alone) and len(taken) == 1


NORMS_IN_FRONT = {  # of one layer; the norm after it is launched with the layer before
    "the same": lambda layer: None,
    "an eps": lambda layer: setattr(layer.intermediate.LayerNorm, "eps", 0.5),
    "an eps of attention": lambda layer: setattr(layer.attention.LayerNorm, "eps", 0.5),
    "the activation": lambda layer: setattr(layer.intermediate, "intermediate_act_fn", nn.ReLU()),
}


@pytest.mark.parametrize(
    ("change", "dtype"),
    [*((change, torch.float32) for change in NORMS_IN_FRONT), ("the same", torch.bfloat16)],
)
def test_norms_in_front_are_launched_with_the_sums_that_they_norm(
    change, dtype, on_kernels, monkeypatch
):
    taken = count(monkeypatch, "_launch_pre_norm_layers")
    head = "RobertaPreLayerNormModel"
    models = pair_of("roberta-prelayernorm", head, on_kernels, num_hidden_layers=4)
    theirs, ours = (each.to(dtype) for each in models)
    with torch.no_grad():  # or all norms and biases would be the same
        for p in theirs.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p), alpha=0.3)
    ours.load_state_dict(theirs.state_dict())
    for each in models:
        NORMS_IN_FRONT[change](each.encoder.layer[2])
    inputs = inputs_of(head, RIGHT, on_kernels)
    with torch.no_grad():
        assert_as_good(theirs, ours(**inputs).last_hidden_state, inputs)
    assert len(taken) == 1


TRAINED = {  # and how many of three layers are one function, or two
    "all": (lambda name: True, 3),
    "all but the bias": (lambda name: not name.startswith("encoder.relative"), 3),
    "the bias and the last layer": (lambda name: "relative" in name or "layer.2" in name, 1),
    "the bias": (lambda name: name.startswith("encoder.relative"), 0),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trained", "autocast"), [*((name, False) for name in TRAINED), ("all", True)]
)
def test_layers_with_a_bias_of_the_scores_are_trained_whole(
    trained, autocast, on_kernels, monkeypatch
):
    """As each of them alone, and each alone as operation by operation."""
    from fastbert import encoder

    ours, (wanted, fused) = mpnet().train(), TRAINED[trained]
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(wanted(name))
    inputs = {name: INPUTS[name].to(on_kernels) for name in ("input_ids", "attention_mask")}

    def gradients(**options) -> dict[str, torch.Tensor]:
        ours.zero_grad()
        torch.manual_seed(1)
        with torch.autocast(on_kernels, torch.bfloat16, enabled=autocast):
            out = ours(**inputs, **options).last_hidden_state
        out.float().square().sum().backward()
        return {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}

    whole, halves = count(monkeypatch, "whole_layer"), count(monkeypatch, "attention_half")
    found = gradients()
    assert (len(whole), len(halves)) == ((3, 0) if fused == 3 else (0, fused))
    assert found and all(map(wanted, found))
    halves.clear()
    halved = gradients(output_hidden_states=True)
    assert len(halves) == fused
    assert found.keys() == halved.keys()
    assert all(torch.equal(found[name], halved[name]) for name in found)
    monkeypatch.setattr(encoder, "takes_attention_half", lambda *a: False)
    apart = gradients(output_hidden_states=True)
    assert len(halves) == fused and found.keys() == apart.keys()
    for name in found:
        off = (found[name] - apart[name]).norm() / apart[name].norm()
        # The bias of keys changes nothing: its gradient is nothing but rounding.
        assert name.endswith(".k.bias") or off < (1e-2 if autocast else 1e-5), (name, off)


@pytest.mark.slow
def test_layers_are_read_once_and_called_by_nobody_until_somebody_looks(reads, calls):
    ours = model()
    expected = hidden(ours)
    assert torch.equal(hidden(ours), expected)
    assert len(reads) == 2 and not calls
    hidden(ours, output_hidden_states=True)
    assert len(calls) == 2, "hidden states are recorded by the layers"
    assert call(ours).last_hidden_state.requires_grad and len(calls) == 2
    handle = ours.encoder.layer[0].register_forward_hook(lambda *a: None)
    hidden(ours)
    handle.remove()
    calls.clear()
    ours.encoder.layer[0].compile(backend="eager")
    hidden(ours)
    assert calls, "a layer that was compiled by itself was not called"


def test_a_copy_has_read_nothing():
    ours = model()
    hidden(ours)
    assert ours.__dict__[plan._PLAN] is not None
    assert copy.deepcopy(ours).__dict__.get(plan._PLAN) is None
