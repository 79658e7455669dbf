"""SPLADE's vectors: the op against its reference, and that no tensor of all logits exists."""

import functools

import pytest
import torch
import torch.nn.functional as F
import transformers
from test_families import SAME, inputs_of, pair_of
from test_model_parity import MASKS
from tiny import RIGHT, specified_by
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from fastbert import ops
from fastbert.families import registry
from fastbert.ops import splade
from fastbert.ops.reference import splade_ref
from fastbert.packing import PackedBatch
from fastbert.testing import assert_matches

FORMS = [(pooling, activation) for pooling in splade.POOLINGS for activation in splade.ACTIVATIONS]
LENGTHS = [[7, 0, 5, 5, 1, 9], [4, 4, 4], [0, 3, 0]]


def tensors(lengths, dtype=torch.float32, words=300, width=16, device="cpu"):
    torch.manual_seed(1)
    found = (torch.randn(sum(lengths), width), torch.randn(words, width) / 4, torch.randn(words))
    return [t.to(device, dtype).requires_grad_() for t in found]


def specification(lengths, pooling, activation):
    return lambda *t: splade_ref(F.linear(*t), lengths, pooling, activation)


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def sizes(request, monkeypatch):
    """Several parts, and several chunks of words, at sizes of a test."""
    if request.param == "as on a CPU":
        monkeypatch.setattr(splade, "_LOGITS", {"cpu": 2**10, "cuda": 2**10})
        monkeypatch.setattr(splade, "_COLUMNS", 64)
        return
    monkeypatch.setattr(splade, "_LOGITS", {})
    monkeypatch.setattr(splade, "_LOGITS_ELSEWHERE", 300 * 10)
    parts = functools.partial(splade._parts, device="cuda")
    monkeypatch.setattr(splade, "_parts", lambda batch, words, device: parts(batch, words))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("pooling", "activation"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vectors_and_gradients(dtype, pooling, activation, lengths, sizes, device):
    given = tensors(lengths, dtype, device=device)
    batch = PackedBatch.from_lengths(lengths, device)
    out = ops.linear_splade(*given, batch, pooling=pooling, activation=activation)
    assert out.dtype == dtype and out.shape == (len(lengths), 300)
    with torch.no_grad():
        again = ops.linear_splade(*given, batch, pooling=pooling, activation=activation)
    assert torch.equal(again, out)
    specified = specification(lengths, pooling, activation)
    assert_matches(out.detach(), specified, [t.detach() for t in given], "vectors")
    if dtype != torch.float32:  # where the largest logit is, 16 bits do not tell
        return
    upstream = torch.randn(out.shape, device=device)

    def gradients(*given):
        given = [t.detach().requires_grad_() for t in given]
        return torch.autograd.grad(specified(*given), given, upstream.to(given[0].dtype))

    found = torch.autograd.grad(out, given, upstream)
    assert_matches(found, gradients, [t.detach() for t in given], "gradients")


@pytest.mark.parametrize(("pooling", "activation"), FORMS)
def test_second_derivatives(pooling, activation):
    given = tensors([3, 0, 2], torch.float64, words=7, width=3)
    batch = PackedBatch.from_lengths([3, 0, 2])
    assert torch.autograd.gradgradcheck(
        lambda *t: ops.linear_splade(*t, batch, pooling=pooling, activation=activation), given
    )


def test_gradients_that_nobody_wants_are_not_made(monkeypatch):
    x, weight, bias = tensors([4, 3])
    batch = PackedBatch.from_lengths([4, 3])
    full = torch.autograd.grad(ops.linear_splade(x, weight, bias, batch).sum(), x)[0]
    alone = ops.linear_splade(x, weight.detach(), bias.detach(), batch)
    assert torch.equal(torch.autograd.grad(alone.sum(), x)[0], full)


def test_autocast(device):
    given = tensors([4, 3], device=device)
    batch = PackedBatch.from_lengths([4, 3], device)
    with torch.autocast(device, torch.bfloat16):
        out = ops.linear_splade(*given, batch)
    assert out.dtype == torch.bfloat16
    narrow = ops.linear_splade(*(t.detach().bfloat16() for t in given), batch)
    assert torch.equal(out, narrow)
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.ones(5, 16)}, "expected 7 rows for 2 sequences, got 5"),
        ({"x": torch.ones(7, 3)}, r"expected x \[N, E\] and weight \[V, E\], got \(7, 3\)"),
        ({"bias": torch.ones(3)}, r"expected a bias \(300,\), got \(3,\)"),
        ({"pooling": "mean"}, "expected pooling max or sum, got 'mean'"),
        ({"activation": "gelu"}, "expected activation relu or log1p_relu, got 'gelu'"),
    ],
)
def test_bad_input_is_refused(change, words):
    x, weight, bias = tensors([4, 3])
    given = {"x": x, "weight": weight, "bias": bias, "batch": PackedBatch.from_lengths([4, 3])}
    with pytest.raises(ValueError, match=words):
        ops.linear_splade(**{**given, **change})


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return out


@pytest.mark.parametrize("pooling", splade.POOLINGS)
def test_no_tensor_of_all_logits_exists(pooling, monkeypatch, on_torch):
    monkeypatch.setattr(splade, "_LOGITS", {"cpu": 2**14})
    given = tensors([50] * 4, words=5000)
    batch = PackedBatch.from_lengths([50] * 4)
    with Largest() as largest:
        ops.linear_splade(*given, batch, pooling=pooling).sum().backward()
    assert largest.elements <= 5000 * 16, "the weight is the largest"  # all logits: 5000 * 200


# ---- models ----

HEADS = [
    (family, name)
    for family in registry.MODEL_TYPES
    if family not in SAME and family != "bert"
    for name in registry.load(family).heads
    if name.endswith("ForMaskedLM")
]


def vectors_of(mask, pooling, activation):
    """As `specified_by` reads them: of logits, packed."""
    rows = PackedBatch.dense(4, 9, "cpu") if mask is None else PackedBatch.from_mask(mask)
    return lambda out: [splade_ref(rows.pack(out.logits), rows.lengths, pooling, activation)]


@pytest.mark.parametrize(
    ("family", "head", "mask"),
    [(*head, "right") for head in HEADS]
    + [(*HEADS[0], mask) for mask in ("none", "left")]
    + [pytest.param(*head, "hole", marks=pytest.mark.slow) for head in HEADS],
)
def test_models_of_every_family(family, head, mask, on_torch):
    theirs, ours = pair_of(family, head)
    inputs = inputs_of(head, MASKS[mask])
    for pooling, activation in (("max", "relu"), ("sum", "log1p_relu")):
        out = ours.splade(**inputs, pooling=pooling, activation=activation)
        read = vectors_of(MASKS[mask], pooling, activation)
        specified, parameters = specified_by(theirs, read, **inputs)
        assert_matches(out.detach(), specified, parameters, f"{head} {pooling}")

    def gradients(*given):
        given = [t.detach().requires_grad_() for t in given]
        found = torch.autograd.grad(specified(*given)[0].sum(), given, allow_unused=True)
        return [g for g in found if g is not None]

    found = torch.autograd.grad(out.sum(), [*ours.parameters()], allow_unused=True)
    found = [g for g in found if g is not None]
    assert_matches(found, gradients, parameters, f"{head} gradients")


def test_packed_sequences_are_pooled_apart(on_torch):
    _, ours = pair_of("distilbert", "DistilBertForMaskedLM")
    inputs = inputs_of("DistilBertForMaskedLM", RIGHT)
    real = RIGHT.bool()
    bounds = F.pad(real.sum(1).cumsum(0), (1, 0)).int()
    lengths = real.sum(1)
    packed = ours.splade(
        input_ids=inputs["input_ids"][real][None], cu_seq_lens_q=bounds, cu_seq_lens_k=bounds,
        max_length_q=int(lengths.max()), max_length_k=int(lengths.max()),
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
    )  # fmt: skip
    torch.testing.assert_close(packed, ours.splade(**inputs), rtol=1e-5, atol=1e-5)


def test_who_watches_sees_logits(on_torch):
    _, ours = pair_of("distilbert", "DistilBertForMaskedLM")
    inputs, seen = inputs_of("DistilBertForMaskedLM", RIGHT), []
    plain = ours.splade(**inputs)
    for part in (ours, ours.vocab_projector):
        hook = part.register_forward_hook(lambda *given: seen.append(given[0]))
        torch.testing.assert_close(ours.splade(**inputs), plain, rtol=1e-5, atol=1e-5)
        assert seen.pop() is part and not seen
        hook.remove()

    class Own(fastbert.DistilBertForMaskedLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 1
            return output

    own = Own(ours.config).eval()
    own.load_state_dict(ours.state_dict())
    assert (own.splade(**inputs) > plain).any()
    with pytest.raises(ValueError, match=r"an attention_mask \[batch, length\], .* \(4, 1, 9, 9\)"):
        ours.splade(input_ids=inputs["input_ids"], attention_mask=torch.zeros(4, 1, 9, 9))


def test_loaded_ones_have_it_too(on_torch):
    theirs = transformers.BertForMaskedLM(
        transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=64, vocab_size=99)
    ).eval()  # fmt: skip
    fastbert.accelerate(theirs)
    assert theirs.splade(**inputs_of("BertForMaskedLM", RIGHT)).shape == (4, 99)


@pytest.mark.slow
def test_it_is_compared_behind_a_check(minilm_folder, on_torch, monkeypatch):
    from fastbert.benchmarks import splade

    short = [{"text": passage["text"][:99]} for passage in splade.passages()]
    monkeypatch.setattr(splade, "passages", lambda: short)
    compare = splade.compare
    found = compare(texts=8, rounds=1, device="cpu")
    assert all(seconds > 0 for pair in found for seconds in pair)
    right = fastbert.BertForMaskedLM.splade
    monkeypatch.setattr(
        fastbert.BertForMaskedLM, "splade", lambda self, **given: 1.001 * right(self, **given)
    )
    with pytest.raises(AssertionError, match="SPLADE vectors"):
        compare(texts=8, rounds=1, device="cpu")
