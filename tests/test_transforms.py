"""Who looks at operations: transforms, tracers, dispatch modes, FLOP counters."""

import pytest
import torch
from tiny import INPUTS, RIGHT, pair
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastbert
from fastbert.ops import onednn
from fastbert.ops.backend import interpreting

pytestmark = pytest.mark.usefixtures("on_torch")
HEAD = "BertForSequenceClassification"
IDS, REAL = INPUTS["input_ids"], RIGHT.bool()


def logits_of(model):
    return lambda x: model(inputs_embeds=x, attention_mask=RIGHT).logits


def by_parameters(model, x):
    def loss(parameters):
        out = torch.func.functional_call(model, parameters, (IDS,), {"attention_mask": RIGHT})
        return out.logits[:, 0].sum()

    weights = {name: p.detach() for name, p in model.named_parameters()}
    return torch.func.grad(loss)(weights)["bert.encoder.layer.0.output.dense.weight"]


functional = torch.autograd.functional
TRANSFORMS = {
    "grad": by_parameters,
    "jvp": lambda m, x: torch.func.jvp(logits_of(m), (x,), (x.cos(),))[1],
    "vjp": lambda m, x: torch.func.vjp(logits_of(m), x)[1](torch.ones(4, 2))[0],
    "jacrev": lambda m, x: torch.func.jacrev(logits_of(m))(x),
    "vmap": lambda m, x: torch.func.vmap(lambda e: m(inputs_embeds=e[None]).logits)(x),
    "forward AD": lambda m, x: forward_ad(m, x),
    "jacobian, vectorized": lambda m, x: functional.jacobian(logits_of(m), x, vectorize=True),
    "jvp by double backward": lambda m, x: functional.jvp(logits_of(m), x, x.cos())[1],
    "hvp": lambda m, x: functional.hvp(lambda e: logits_of(m)(e).pow(2).sum(), x, x.cos())[1],
}


def forward_ad(model, x):
    import torch.autograd.forward_ad as fwd

    with fwd.dual_level():
        return fwd.unpack_dual(logits_of(model)(fwd.make_dual(x, x.cos()))).tangent


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_gives_what_it_gives_of_transformers(name):
    theirs, ours = (m.double() for m in pair(HEAD))
    x = theirs.get_input_embeddings()(IDS).detach()
    expected, actual = (TRANSFORMS[name](m, x) for m in (theirs, ours))
    assert expected.any()
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["jacobian, vectorized", "vjp", "jvp by double backward"])
def test_a_transform_in_single_precision(name, monkeypatch):
    """There the products are other operations, those of large weights' gradients too."""
    monkeypatch.setattr(onednn, "WEIGHT_GRADIENT_FROM", 0)
    theirs, ours = pair(HEAD)
    x = theirs.get_input_embeddings()(IDS).detach()
    expected, actual = (TRANSFORMS[name](m, x) for m in (theirs, ours))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_works_for_other_shapes(tmp_path):
    theirs, ours = pair("BertModel", return_dict=False)
    with torch.no_grad():
        traced = torch.jit.trace(ours, (IDS, RIGHT), check_trace=False)
        torch.jit.save(traced, tmp_path / "traced.pt")
        again = torch.jit.load(tmp_path / "traced.pt")
        for rows, length in ((4, 9), (2, 5)):
            ids, mask = IDS[:rows, :length], RIGHT[:rows, :length]
            actual, expected = again(ids, mask)[0], theirs(ids, mask)[0]
            real = mask.bool()
            torch.testing.assert_close(actual[real], expected[real], atol=1e-5, rtol=1e-4)
            assert not actual[~real].any()


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.namespace)
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_plain_operations():
    _, ours = pair(HEAD)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), Names() as names:
            ours(**INPUTS).logits.sum()
        assert names.seen == {"aten"}
    if interpreting():
        with fastbert.backend(None), torch.no_grad():
            with Names() as names:
                ours(**INPUTS)
            assert names.seen == {"aten"}
            with fastbert.backend("triton"), Names() as names:
                ours(**INPUTS)
            assert "fastbert" in names.seen  # who asks for the kernels gets them


def test_flops_are_those_of_real_tokens():
    """Products of 21 tokens in place of 36, forward and backward."""
    counts = {}
    for model in pair("BertModel", num_hidden_layers=3):
        model.pooler = None
        for name, inputs in (("whole", {"input_ids": IDS}), ("ragged", INPUTS)):
            model.zero_grad()
            with FlopCounterMode(display=False) as counter:
                model(**inputs)[0].sum().backward()
            counts[type(model), name] = counter.get_total_flops()
            by_op = counter.get_flop_counts()["Global"]
            products = sum(n for op, n in by_op.items() if op is not torch.ops.aten.bmm)
            counts[type(model), name, "products"] = products
    theirs, ours = (type(m) for m in pair("BertModel"))
    assert counts[ours, "whole"] == counts[theirs, "whole"]
    ratio = counts[ours, "ragged", "products"] / counts[theirs, "ragged", "products"]
    assert ratio == pytest.approx(21 / 36)
    assert counts[ours, "ragged"] < 21 / 36 * counts[theirs, "ragged"]
