"""PEFT over models of every family: what it trains, and what it switches between."""

import copy
import inspect

import pytest
import torch
import transformers
from test_families import OTHERS, SAME, config_of, inputs_of
from tiny import RIGHT, one_is_quick, specified_by

import fastbert
from fastbert.families import registry
from fastbert.families.model import PackedModel
from fastbert.families.obstacle import obstacle
from fastbert.testing import assert_matches

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.usefixtures("on_torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),  # peft calls an old name
]
# Those whose layers are code of their own, with a head that sorts sequences.
HEADS = {
    family: head
    for family in ("bert", *OTHERS)
    if family not in SAME
    for head in registry.load(family).heads
    if head.endswith("ForSequenceClassification")
}
IN_FRONT = ("bert", "roberta", "ernie")  # which transformers has past keys and values for


def adapted(family: str, kind: str):
    """transformers' model with an adapter that changes something."""
    torch.manual_seed(0)
    model = getattr(transformers, HEADS[family])(config_of(family)).eval()
    parts = registry.load(family).parts
    query, value, dense = (
        name.rpartition(".")[2] for name in (parts.query, parts.value, parts.intermediate)
    )
    made = {
        "lora": lambda: peft.LoraConfig(r=2, target_modules=[query, value, dense]),
        "dora": lambda: peft.LoraConfig(r=2, target_modules=[query, value], use_dora=True),
        "ia3": lambda: peft.IA3Config(target_modules=[value, dense], feedforward_modules=[dense]),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
        "prompt": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    }
    model = peft.get_peft_model(model, made[kind]()).eval()
    if kind == "lora":
        model.add_adapter("other", made[kind]())
    shake(model)
    return model


def shake(model: torch.nn.Module) -> None:
    """Adapters begin as nothing."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "ia3" in name:
            torch.nn.init.normal_(parameter, std=0.3)


def encoder_of(model: torch.nn.Module) -> PackedModel:
    return next(module for module in model.modules() if isinstance(module, PackedModel))


def check(theirs: torch.nn.Module, ours: torch.nn.Module, inputs: dict) -> None:
    """Logits, and the gradient of what is trained."""
    specified, parameters = specified_by(theirs, lambda out: [out.logits], **inputs)
    found = ours(**inputs).logits
    assert_matches(found.detach(), specified, parameters, "logits")
    trained = [i for i, p in enumerate(theirs.parameters()) if p.requires_grad]

    def gradients(*given):
        given = [t.detach().requires_grad_(i in trained) for i, t in enumerate(given)]
        wanted = [given[i] for i in trained]
        made = torch.autograd.grad(specified(*given)[0].square().sum(), wanted, allow_unused=True)
        return [g for g in made if g is not None]

    wanted = [p for p in ours.parameters() if p.requires_grad]
    made = torch.autograd.grad(found.square().sum(), wanted, allow_unused=True)
    assert_matches([g for g in made if g is not None], gradients, parameters, "gradients")


@pytest.mark.parametrize("kind", ["dora", "ia3"])
@pytest.mark.parametrize("family", HEADS)
def test_adapters_of_layers(family, kind):
    theirs = adapted(family, kind)
    ours = copy.deepcopy(theirs)
    handle = fastbert.accelerate(ours)
    assert not handle.notes and obstacle(encoder_of(ours)) is None
    check(theirs, ours, inputs_of(HEADS[family], RIGHT))


@pytest.mark.parametrize("family", one_is_quick(HEADS))
def test_several_adapters(family):
    """Switched, switched off, merged and taken out again."""
    theirs = adapted(family, "lora")
    ours = copy.deepcopy(theirs)
    assert not fastbert.accelerate(ours).notes
    inputs, seen = inputs_of(HEADS[family], RIGHT), []
    for name in ("default", "other"):
        for model in (theirs, ours):
            model.set_adapter(name)
        check(theirs, ours, inputs)
        seen.append(ours(**inputs).logits)
    for model in (theirs, ours):
        model.merge_adapter()
    merged = ours(**inputs).logits
    torch.testing.assert_close(merged, seen[1], rtol=1e-4, atol=1e-4)
    for model in (theirs, ours):
        model.unmerge_adapter()
    with theirs.disable_adapter(), ours.disable_adapter():
        specified, parameters = specified_by(theirs, lambda out: [out.logits], **inputs)
        plain = ours(**inputs).logits
        assert_matches(plain.detach(), specified, parameters, "without")
    assert (seen[0] - seen[1]).abs().max() > 0.01 < (plain - seen[1]).abs().max()


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", IN_FRONT)
def test_virtual_tokens(family, kind, caplog, monkeypatch):
    """Those in front of keys and values are transformers' to compute, and that is said."""
    monkeypatch.setattr("fastbert.families.obstacle._said", set())
    theirs = adapted(family, kind)
    encoder = inspect.signature(theirs.get_base_model().base_model.forward).parameters
    if kind == "prefix" and "past_key_values" not in encoder:
        pytest.skip("peft looks for caches by a name that this version of transformers has not")
    ours = copy.deepcopy(theirs)
    fastbert.accelerate(ours)
    check(theirs, ours, inputs_of(HEADS[family], RIGHT))
    assert ("is not packed" in caplog.text) is (kind == "prefix")
