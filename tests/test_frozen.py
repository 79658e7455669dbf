"""Frozen models give what their layers give, for any batch, and never what their weights were."""

import copy
import gc
import logging
import pickle
import platform
import threading
import weakref

import pytest
import torch
from forked import forked
from test_plan import CHANGES
from tiny import pair, tiny_config
from torch import nn

import fastbert
from fastbert.frozen import Frozen
from fastbert.ops import onednn, onednn_layer
from fastbert.ops.onednn import bucket_of
from fastbert.testing import assert_within_budget

pytestmark = [
    pytest.mark.usefixtures("on_torch"),
    pytest.mark.skipif(not onednn.available(), reason="needs torch's operators of oneDNN"),
]
LENGTHS = ([9], [4, 1, 7], [3, 3, 3, 8], [1], [33, 40, 12], [0, 5, 2], [40] * 8)


def batch_of(lengths, width=None):
    width = width or max(lengths)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.randint(5, 90, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


def frozen(**options) -> fastbert.BertModel:
    torch.manual_seed(0)
    config = tiny_config(initializer_range=0.3, **options)
    return fastbert.BertModel(config, frozen=True).eval()


def hidden(model, inputs=None):
    with torch.no_grad():
        return model(**(inputs or batch_of([9, 4, 1, 7]))).last_hidden_state


def copied(model) -> bool:
    return model.frozen.nbytes > 0


def of_layers(model, inputs=None):
    """What the layers of this model compute now, from their own weights."""
    kept, model.frozen = model.frozen, None
    try:
        return hidden(model, inputs)
    finally:
        model.frozen = kept


@pytest.mark.parametrize("dtype", onednn.DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu", "silu"])
def test_every_batch_is_within_the_budget(activation, dtype):
    theirs, ours = (m.to(dtype) for m in pair("BertModel", hidden_act=activation))
    ours.frozen = Frozen()
    exact = copy.deepcopy(theirs).double()
    rows = []
    for inputs in map(batch_of, LENGTHS):
        real = inputs["attention_mask"].bool()
        with torch.inference_mode():
            found = [model(**inputs)[0] for model in (ours, exact, theirs)]
        assert not found[0][~real].any()
        rows.append([t[real] for t in found])
    assert_within_budget(*map(torch.cat, zip(*rows, strict=True)), activation)
    assert copied(ours) == onednn.available(dtype)


def test_packed_input_and_pooler(monkeypatch):
    model = frozen()
    ids = torch.randint(5, 90, (1, 20))
    position_ids = torch.tensor([[*range(12), *range(8)]])
    bounds = torch.tensor([0, 12, 20], dtype=torch.int32)
    inputs = {"input_ids": ids, "position_ids": position_ids, "cu_seq_lens_q": bounds}
    assert (hidden(model, inputs) - of_layers(model, inputs)).abs().max() < 1e-5
    calls = []
    run = Frozen.__call__
    monkeypatch.setattr(Frozen, "__call__", lambda *a: calls.append(a) or run(*a))
    with torch.no_grad():
        pooled = model(**batch_of([9, 4])).pooler_output
    assert calls and pooled.shape == (2, 32)


def test_real_weights(minilm_folder):
    import transformers

    theirs = transformers.BertModel.from_pretrained(minilm_folder).eval()
    ours = fastbert.BertModel.from_pretrained(minilm_folder, frozen=True).eval()
    inputs = batch_of([64, 3, 17])
    real = inputs["attention_mask"].bool()
    expected = hidden(theirs, inputs)[real]
    assert (hidden(ours, inputs)[real] - expected).abs().max() < 1e-5
    assert 42e6 < ours.frozen.nbytes < 43e6
    if onednn.available(torch.bfloat16):
        halved = hidden(ours.to(torch.bfloat16), inputs)[real].float()
        assert 21e6 < ours.frozen.nbytes < 21.5e6
        assert torch.cosine_similarity(halved, expected).min() > 0.999


# Prints how many pages eight tensors of 5 MB are given anew, ten times, once a model has run.
_PAGES = """
import resource, sys, torch, fastbert
from tiny import tiny_config

model = fastbert.BertModel(tiny_config(), frozen=sys.argv[1] == "frozen").eval()
with torch.inference_mode():
    model(torch.ones(1, 4, dtype=torch.long))

def fill():
    [torch.ones(1_250_000) for _ in range(8)]

fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators do as they do")
def test_what_a_call_frees_is_kept_for_the_next_one():
    pages, ordinary = (int(forked(_PAGES, which).stdout) for which in ("frozen", "ordinary"))
    assert 10 * pages < ordinary


@pytest.mark.slow
@pytest.mark.skipif(not onednn.available(torch.bfloat16), reason="this CPU has no bf16")
def test_embeddings_in_bf16_are_those_of_fp32(minilm_folder):
    """What README says of them."""
    import transformers

    from fastbert.demo import passages

    texts = [passage["text"] for passage in passages()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder)
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    weights = inputs["attention_mask"][..., None] / inputs["attention_mask"].sum(1)[:, None, None]
    exact, half = (
        (hidden(model.eval(), inputs).float() * weights).sum(1)
        for model in (
            transformers.BertModel.from_pretrained(minilm_folder),
            fastbert.BertModel.from_pretrained(minilm_folder, dtype=torch.bfloat16, frozen=True),
        )
    )
    assert torch.cosine_similarity(exact, half).min() > 0.9999


def test_the_number_of_rows_is_rounded_up_a_little():
    for rows in (1, 4, 5, 63, 64, 65, 96, 97, 200, 257, 513, 1000, 2049, 16384):
        most = rows + 3 if rows <= 96 else max(rows + 7, rows * (1 + 1 / 16))
        assert rows <= bucket_of(rows) <= most
    assert len({bucket_of(rows) for rows in range(1, 257)}) == 24 + 20
    assert len({bucket_of(rows) for rows in range(1, 8193)}) == 156


@pytest.mark.parametrize("kind", ["ordinary", "frozen"])
def test_products_of_new_lengths_get_few_numbers_of_rows(kind, monkeypatch):
    """oneDNN prepares itself for each: a stream of texts would be slower than one text again."""
    rows = []
    monkeypatch.setattr(onednn_layer, "UP_TO", 0)  # a layer piece by piece
    for name in ("product", "product_add"):
        run = getattr(onednn, name)
        monkeypatch.setattr(
            onednn, name, lambda x, *rest, run=run: rows.append(x.shape[0]) or run(x, *rest)
        )
    model = frozen()
    show = of_layers if kind == "ordinary" else hidden
    for length in range(1, 21):
        assert show(model, batch_of([length])).shape[1] == length
    assert len(rows) == 20 * 2 * (6 if kind == "ordinary" else 4)
    assert set(rows) == {4, 8, 12, 16, 20}


def load(model):
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})


def optimize(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.enable_grad():
        model.train()(**batch_of([5])).last_hidden_state.square().sum().backward()
    optimizer.step()
    model.eval()


def tie(model):
    first, second = model.encoder.layer
    second.output.dense.weight = first.output.dense.weight


def loaded_by_assignment(model):
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, assign=True)


COUNTED = {
    "load_state_dict": load,
    "load_state_dict, assigned": loaded_by_assignment,
    "an optimizer": optimize,
    "in place": lambda model: model.encoder.layer[1].attention.self.key.weight.mul_(2),
    "one value": lambda model: model.encoder.layer[0].output.dense.weight.view(-1)[3].fill_(9.0),
    "a bias in place": lambda model: model.encoder.layer[0].intermediate.dense.bias.add_(1),
    "a norm in place": lambda model: model.encoder.layer[0].output.LayerNorm.weight.mul_(2),
    "initialised anew": lambda model: nn.init.normal_(model.encoder.layer[0].output.dense.weight),
    "weights that are shared": tie,
    **{
        name: lambda model, change=change: change(model.encoder.layer[1])
        for name, change in CHANGES.items()
        if name not in ("a value in place", "dropout")
    },
}


@pytest.mark.parametrize("name", COUNTED)
def test_weights_that_change_are_copied_again(name, caplog):
    model = frozen()
    before = hidden(model)
    assert copied(model)
    with caplog.at_level(logging.INFO, "fastbert"), torch.no_grad():
        COUNTED[name](model)
        actual = hidden(model)
    assert (actual - before).abs().max() > 1e-3, "the change changes nothing"
    assert torch.allclose(actual, of_layers(model), atol=1e-4, rtol=1e-4)
    assert copied(model) == (name != "a module of another kind")


@pytest.mark.parametrize("whole", [True, False], ids=["replaced", "in place"])
def test_a_change_of_any_one_tensor_is_seen(whole):
    """Of those that are copied, and of those that are used as they are."""
    model = frozen()
    for name, parameter in model.encoder.layer[0].named_parameters():
        before = hidden(model)
        changed = parameter.detach() + torch.randn_like(parameter)
        with torch.no_grad():
            if whole:
                module, _, leaf = name.rpartition(".")
                owner = model.encoder.layer[0].get_submodule(module)
                setattr(owner, leaf, nn.Parameter(changed))
            else:
                parameter.copy_(changed)
        after = hidden(model)
        assert torch.allclose(after, of_layers(model), atol=1e-4), name
        # The bias of the keys alone changes no attention weight.
        assert name.endswith("key.bias") or (after - before).abs().max() > 1e-3, name


def test_a_change_is_said_once(caplog):
    model = frozen()
    hidden(model)
    with caplog.at_level(logging.INFO, "fastbert"):
        hidden(model)
        assert not caplog.messages
        with torch.no_grad():
            model.encoder.layer[0].output.dense.weight.mul_(2)
        hidden(model), hidden(model)
    assert [m for m in caplog.messages if "copies frozen weights again" in m] == caplog.messages[:1]


def test_other_dtypes_run_as_they_do():
    model = frozen()
    hidden(model)
    for dtype in (torch.float64, torch.float16):
        model.to(dtype)
        assert torch.equal(hidden(model), of_layers(model)) and not copied(model)
    model.to(torch.float32).encoder.layer[1].output.dense.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):  # torch's own words
        hidden(model)
    model.to(torch.float32)
    assert torch.allclose(hidden(model), of_layers(model), atol=1e-4)


def test_what_torch_does_not_count_needs_a_refresh():
    model = frozen()
    handle = fastbert.accelerate(model, frozen=True)
    hidden(model)
    model.encoder.layer[1].output.dense.weight.data.mul_(3)
    handle.refresh()
    assert torch.allclose(hidden(model), of_layers(model), atol=1e-4)


def test_gradients_hooks_training_and_autocast_take_the_ordinary_path(monkeypatch):
    model = frozen()
    hidden(model)

    def used(*args):
        raise AssertionError("the copies were used")

    monkeypatch.setattr(Frozen, "_copies", used)
    model(**batch_of([5, 3])).last_hidden_state.sum().backward()
    assert model.encoder.layer[0].output.dense.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**batch_of([5, 3]))
    with torch.no_grad():
        model(**batch_of([5, 3]), output_attentions=True)
        handle = model.encoder.layer[0].register_forward_hook(lambda *args: None)
        model(**batch_of([5, 3]))
    handle.remove()
    with pytest.raises(AssertionError, match="the copies were used"):
        hidden(model)


def test_weights_made_in_inference_mode_are_not_copied():
    """torch counts no change of them."""
    with torch.inference_mode():
        model = frozen()
        first = hidden(model)
        assert not copied(model)
        model.encoder.layer[0].output.dense.weight.mul_(3)
        assert (hidden(model) - first).abs().max() > 1e-3


def test_without_the_operators_layers_run_as_they_do(monkeypatch):
    model = frozen()
    expected = hidden(model)
    monkeypatch.setitem(onednn._known, torch.float32, False)
    model.frozen.forget()
    assert torch.allclose(hidden(model), expected, atol=1e-4) and not copied(model)


def test_copies_belong_to_one_model_and_go_with_it():
    model = frozen()
    expected = hidden(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.frozen is not model.frozen and not copied(twin)
        assert torch.equal(hidden(twin), expected) and copied(twin)
    handle = fastbert.accelerate(model, frozen=True)
    hidden(model)
    gone = weakref.ref(model.frozen)
    handle.undo()
    gc.collect()
    assert gone() is None and "frozen" not in model.__dict__
    assert hidden(model).shape == expected.shape


def test_a_model_of_somebody_else_is_frozen_and_let_go():
    import transformers

    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(tiny_config()).eval()
    with torch.no_grad():
        expected = model(**batch_of([9, 4])).logits
        with fastbert.accelerate(model, frozen=True) as handle:
            assert torch.allclose(model(**batch_of([9, 4])).logits, expected, atol=1e-5)
            assert copied(model.bert)
            handle.refresh()
            assert not copied(model.bert)
        assert torch.equal(model(**batch_of([9, 4])).logits, expected)


def test_shared_memory():
    model = frozen()
    expected = hidden(model)
    model.share_memory()
    assert torch.equal(hidden(model), expected)


def test_threads_get_what_one_gets():
    model = frozen()
    inputs = [batch_of([n, 3]) for n in (5, 9, 17, 33)]
    expected = [of_layers(model, i) for i in inputs]
    wrong, start = [], threading.Barrier(4)

    def call(index):
        with fastbert.backend("torch"):
            start.wait()
            for _ in range(5):
                actual = hidden(model, inputs[index])
                if not torch.allclose(actual, expected[index], atol=1e-4):
                    wrong.append(index)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled_and_exported_programs_use_weights():
    model = frozen()
    hidden(model)
    exported = torch.export.export(model, (), batch_of([9, 9]), strict=False).module()
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(2)
        assert torch.allclose(
            exported(**batch_of([9, 9]))[0], of_layers(model, batch_of([9, 9])), atol=1e-4
        )
