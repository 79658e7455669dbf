"""What stands in the place of a part of BERT gets what transformers would give it."""

import copy
import copyreg
import functools
import types

import pytest
import torch
import transformers
from tiny import INPUTS, RIGHT, assert_as_good, pair, tiny_config
from torch import nn

import fastbert
from fastbert.families import known
from fastbert.families.obstacle import obstacle
from fastbert.training import PackedCollator

pytestmark = pytest.mark.usefixtures("on_torch")
REAL = RIGHT.bool()


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _forget_what_was_said(monkeypatch):
    monkeypatch.setattr("fastbert.families.obstacle._said", set())


class MeanPool(nn.Module):
    def forward(self, hidden):
        return hidden.mean(1)


class Recurrent(nn.Module):
    """A head that reads its neighbours, padding included."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(32, 16, bidirectional=True, batch_first=True)
        self.out = nn.Linear(32, 99)

    def forward(self, hidden):
        return self.out(self.lstm(hidden)[0])


class Centred(nn.Module):
    """Something around a module that looks along the sequence."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = self.inner(x)
        return y - y.mean(1, keepdim=True)


class LinearOfSequences(nn.Linear):
    def forward(self, x):
        return super().forward(x) * x.shape[1]


class Wrapped(nn.Module):
    """Around the encoder, with transformers' arguments and no others."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, position_ids=None,
                inputs_embeds=None, return_dict=None):  # fmt: skip
        return self.inner(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            return_dict=return_dict,
        )  # fmt: skip


def replace(path: str, make):
    def change(model):
        parent, _, name = path.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, name, make(getattr(parent, name)))

    return change


def patch(path: str):
    """A forward that depends on the shape, put on the instance."""

    def change(model):
        module = model.get_submodule(path)
        module.forward = lambda *args, old=module.forward, **kw: old(*args, **kw) * args[0].dim()

    return change


PARTS = {
    "pooler": replace("bert.pooler", lambda _: MeanPool()),
    "pooler's dense": replace("bert.pooler.dense", LinearOfSequences.__call__),
    "head": replace("cls", lambda _: Recurrent()),
}
LAYER = "bert.encoder.layer.0."
CHANGES = {
    "word embeddings": replace("bert.embeddings.word_embeddings", Centred),
    "norm of the embeddings": replace("bert.embeddings.LayerNorm", Centred),
    "query": replace(LAYER + "attention.self.query", Centred),
    "dense": replace(LAYER + "intermediate.dense", Centred),
    "dense, patched": patch(LAYER + "intermediate.dense"),
    "norm": replace(LAYER + "output.LayerNorm", Centred),
    "norm over the sequence": replace(LAYER + "output.LayerNorm", lambda _: nn.LayerNorm((9, 32))),
    "activation": replace(LAYER + "intermediate.intermediate_act_fn", Centred),
    "softmax over tokens": replace(
        LAYER + "intermediate.intermediate_act_fn", lambda _: nn.Softmax(1)
    ),
    "in a Sequential": replace(
        LAYER + "output.dense", lambda m: nn.Sequential(m, Centred(nn.Identity()))
    ),
    "attention": replace(LAYER + "attention", lambda m: AttentionTwice(m)),
    "layer, patched": patch("bert.encoder.layer.1"),
    "head": replace("cls", lambda _: Recurrent()),
    "head, patched": patch("cls.predictions"),
    "decoder": replace("cls.predictions.decoder", Centred),
    "transform": replace("cls.predictions.transform", Centred),
}


class AttentionTwice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        output, weights = self.inner(*args, **kwargs)
        return output * 2, weights


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("training", [False, True])
def test_a_replaced_part_of_a_masked_lm_sees_what_it_sees_in_transformers(what, training):
    models = pair("BertForMaskedLM", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    labels = INPUTS["input_ids"].masked_fill(~REAL, -100)
    results = []
    for model in models:
        torch.manual_seed(1)
        CHANGES[what](model)
        with torch.set_grad_enabled(training):
            output = model.train(training)(**INPUTS, labels=labels)
        results.append((output.logits[REAL].detach(), output.loss.detach()))
    torch.testing.assert_close(results[1], results[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "make",
    [lambda _: MeanPool(), Wrapped, lambda m: torch.nn.Sequential(m, nn.Identity())],
    ids=["mean", "wrapped", "in a Sequential"],
)
@pytest.mark.parametrize("mask", [None, RIGHT, RIGHT.flip(1)], ids=["whole", "right", "left"])
def test_a_replaced_pooler_sees_the_whole_batch(make, mask, caplog):
    theirs, ours = pair("BertModel")
    inputs = {"input_ids": INPUTS["input_ids"], "attention_mask": mask}
    expected, actual = [], []
    for model, outputs in ((theirs, expected), (ours, actual)):
        if make is Wrapped:
            model.pooler.forward = lambda x, old=model.pooler.forward: old(x) * x.shape[1]
        else:
            model.pooler = make(model.pooler)
        outputs.append(model(**inputs))
    pooled = [outputs[0].pooler_output for outputs in (actual, expected)]
    torch.testing.assert_close(*pooled, atol=1e-4, rtol=1e-4)
    assert "a pooler that it does not know" in caplog.text
    assert obstacle(ours) is None
    if mask is not None:
        assert not actual[0][0][~mask.bool()].any()  # what is returned has zeros as ever


def packed(model):
    examples = [{"input_ids": list(range(5, 5 + n))} for n in (5, 9, 3)]
    return PackedCollator(model)(examples)


@pytest.mark.usefixtures("on_torch")
@pytest.mark.parametrize(
    "module", ["bert.embeddings", "bert.encoder.layer.0.attention.self", "bert.encoder.layer.1",
               "bert.pooler"],
)  # fmt: skip
def test_packed_sequences_never_attend_to_each_other(module):
    """What runs transformers' own code refuses them, and takes one alone."""
    _, ours = pair("BertForSequenceClassification")
    hook = ours.get_submodule(module).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"3 packed sequences .* has a hook.*pass a padded batch"):
        ours(**packed(ours))
    one = PackedCollator(ours)([{"input_ids": [5, 6, 7]}])
    watched = ours(**one).logits
    hook.remove()
    torch.testing.assert_close(ours(**one).logits, watched, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("on_torch")
def test_packed_sequences_and_a_pooler_that_is_not_known():
    _, ours = pair("BertForSequenceClassification")
    ours.bert.pooler = MeanPool()
    with pytest.raises(ValueError, match=r"own pooler for packed .*, got a MeanPool.*for one"):
        ours(**packed(ours))


@pytest.mark.usefixtures("on_torch")
def test_a_pooler_that_peft_trains_whole_is_known(caplog):
    peft = pytest.importorskip("peft")
    _, ours = pair("BertForSequenceClassification")
    expected = ours(**packed(ours)).logits
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=["pooler", "classifier"])
    model = peft.get_peft_model(ours, config).eval()
    torch.testing.assert_close(model(**packed(model)).logits, expected)
    with torch.no_grad():
        model.base_model.model.bert.pooler.modules_to_save["default"].dense.bias.add_(1.0)
    assert (model(**packed(model)).logits - expected).abs().max() > 0.01
    assert "a pooler that it does not know" not in caplog.text


LABELS = {
    "BertForTokenClassification": {"labels": INPUTS["input_ids"] % 2},
    "BertForQuestionAnswering": {
        "start_positions": torch.tensor([1, 2, 0, 3]),
        "end_positions": torch.tensor([3, 3, 0, 4]),
    },
    "BertForMaskedLM": {"labels": INPUTS["input_ids"]},
    "BertForPreTraining": {
        "labels": INPUTS["input_ids"],
        "next_sentence_label": torch.tensor([0, 1, 1, 0]),
    },
    "BertForSequenceClassification": {"labels": torch.tensor([0, 1, 1, 0])},
}


@pytest.mark.parametrize("how", ["wrapped", "patched", "subclass"])
@pytest.mark.parametrize("head", LABELS)
def test_an_encoder_with_something_around_it(head, how):
    """It gets no keyword that transformers does not know, and losses see padding all the same."""
    models = pair(head)
    for model in models:
        if how == "wrapped":
            model.bert = Wrapped(model.bert)
        elif how == "patched":
            own = model.bert.forward
            model.bert.forward = lambda input_ids, attention_mask=None, token_type_ids=None, \
                position_ids=None, inputs_embeds=None, return_dict=None, own=own: own(
                    input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
                    return_dict=return_dict,
                )  # fmt: skip
        else:

            class Mine(type(model.bert)):
                def forward(self, *args, **kwargs):
                    assert not any("fastbert" in key for key in kwargs)
                    return super().forward(*args, **kwargs)

            model.bert.__class__ = Mine
    if head in ("BertForMaskedLM", "BertForPreTraining") and how != "subclass":
        for model in models:  # these heads hand on what else they were given
            model.bert.forward = dropping_cross_attention(model.bert.forward)
    theirs, ours = models
    expected, actual = (m(**INPUTS, **LABELS[head]) for m in (theirs, ours))
    torch.testing.assert_close(actual.loss, expected.loss, atol=1e-4, rtol=1e-4)


def dropping_cross_attention(forward):
    def call(*args, encoder_hidden_states=None, encoder_attention_mask=None, **kwargs):
        return forward(*args, **kwargs)

    return call


def test_code_of_transformers_that_was_patched_runs(monkeypatch):
    """On the class, after import: whoever patches it wants it to be called."""
    hf = transformers.models.bert.modeling_bert
    for owner, name in (
        (hf.BertSelfOutput, "forward"),
        (hf.BertLayer, "feed_forward_chunk"),
        (hf.BertForMaskedLM, "forward"),
        (hf.BertForPreTraining, "forward"),
        (nn.LayerNorm, "forward"),
        (transformers.activations.GELUActivation, "forward"),
        (hf, "eager_attention_forward"),
    ):
        head = owner.__name__ if owner.__name__.startswith("BertFor") else "BertForMaskedLM"
        _, ours = pair(head)
        calls, before = [], getattr(owner, name)

        @functools.wraps(before)
        def noted(*args, own=before, calls=calls, **kwargs):
            calls.append(1)
            return own(*args, **kwargs)

        with monkeypatch.context() as patching:
            patching.setattr(owner, name, noted)
            assert name in obstacle(ours.bert)
            ours(**INPUTS)
        assert calls, name
        assert obstacle(ours.bert) is None


def test_hooks_on_every_module_see_them_all():
    from torch.nn.modules.module import register_module_forward_hook

    seen = []
    theirs, ours = pair("BertModel")
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    theirs(**INPUTS)
    count = len(seen)
    ours(**INPUTS)
    handle.remove()
    assert seen[count:] == seen[:count]
    assert obstacle(ours) is None


# Subclasses


class Mine(transformers.BertModel):
    """Nothing of its own that a call would see."""

    def helper(self):
        return self.config.hidden_size


class MyClassifier(transformers.BertForSequenceClassification):
    pass


def test_a_subclass_without_code_of_its_own_is_accelerated(tmp_path):
    import pickle

    theirs = Mine(tiny_config(initializer_range=0.3)).eval()
    ours = copy.deepcopy(theirs)
    handle = fastbert.accelerate(ours)
    assert not handle.notes and "" in handle.changed
    assert isinstance(ours, Mine) and isinstance(ours, fastbert.BertModel)
    assert ours.helper() == 32 and obstacle(ours) is None
    assert_as_good(theirs, ours(**INPUTS)[0])
    assert not ours(**INPUTS)[0][~REAL].any()
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is type(ours)
        assert_as_good(theirs, copied(**INPUTS)[0])
    code = copyreg.dispatch_table[type(type(ours))](type(ours))
    assert code[1] == (fastbert.BertModel, Mine)  # which another process imports
    ours.save_pretrained(tmp_path)
    assert Mine.from_pretrained(tmp_path).config.architectures == ["Mine"]
    assert type(handle.undo()) is Mine
    classifier = MyClassifier(tiny_config()).eval()
    expected = classifier(**INPUTS).logits
    assert not fastbert.accelerate(classifier).notes
    torch.testing.assert_close(classifier(**INPUTS).logits, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_linears_that_quantise_all_rows_together_run_in_transformers_code():
    """A row's result depends on the scale of all of them, of padding too."""
    results = []
    for model in pair("BertModel"):
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        results.append(small(**INPUTS)[0][REAL])
    torch.testing.assert_close(results[1], results[0])
    assert "not known to work row by row" in obstacle(small)


def test_layers_of_peft_are_known():
    peft = pytest.importorskip("peft")
    theirs, _ = pair("BertModel")
    for config in (
        peft.LoraConfig(target_modules=["query", "dense"], init_lora_weights=False),
        peft.LoraConfig(target_modules=["word_embeddings", "value"], use_dora=False),
        peft.IA3Config(target_modules=["key"], feedforward_modules=[]),
        peft.LoHaConfig(target_modules=["query"], init_weights=False),
        peft.LNTuningConfig(target_modules=["LayerNorm"]),
    ):
        tuned = peft.get_peft_model(copy.deepcopy(theirs), config).eval()
        expected = tuned(**INPUTS)[0][REAL]
        with fastbert.accelerate(tuned) as handle:
            assert not handle.notes, handle.notes
            torch.testing.assert_close(tuned(**INPUTS)[0][REAL], expected, atol=1e-4, rtol=1e-4)


def test_what_is_known_to_work_by_row():
    works = [
        nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.GELU()), nn.Embedding(3, 2),
        type("Sub", (nn.Linear,), {})(2, 2), torch.nn.functional.gelu,
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    ]  # fmt: skip
    others = [
        LinearOfSequences(2, 2), nn.Conv1d(2, 2, 1), nn.LSTM(2, 2), nn.Softmax(1),
        nn.LayerNorm((3, 2)), nn.Sequential(nn.Linear(2, 2), MeanPool()), nn.Bilinear(2, 2, 2),
        type("Called", (nn.Linear,), {"__call__": lambda self, x: x})(2, 2), lambda x: x,
    ]  # fmt: skip
    patched = nn.Linear(2, 2)
    patched.forward = types.MethodType(lambda self, x: x, patched)
    hooked = nn.Sequential(nn.Linear(2, 2))
    hooked[0].register_forward_hook(lambda *args: None)
    assert all(map(known.row_wise, works))
    assert not any(map(known.row_wise, [*others, patched, hooked]))


def test_what_was_looked_at_is_forgotten_when_it_changes():
    _, ours = pair("BertModel")
    assert obstacle(ours) is None and obstacle(ours) is None
    layer = ours.encoder.layer[1]
    changes = {
        "a child": lambda: setattr(layer.output, "dense", Centred(layer.output.dense)),
        "a class": lambda: setattr(layer.output.dense, "__class__", LinearOfSequences),
        "a hook": lambda: layer.intermediate.register_forward_pre_hook(lambda *args: None),
        "other hooks": lambda: setattr(
            layer.intermediate.dense, "_forward_hooks", {0: lambda *args: None}
        ),
        "a forward": lambda: setattr(layer.attention, "forward", lambda *args: None),
        "the layers": lambda: setattr(ours.encoder, "layer", nn.ModuleList([Centred(layer)])),
        "a setting": lambda: setattr(layer.attention.self, "is_causal", True),
    }
    for name, change in changes.items():
        before = copy.deepcopy(ours)
        assert obstacle(ours) is None
        change()
        assert obstacle(ours) is not None, name
        assert obstacle(before) is None
        ours, layer = before, before.encoder.layer[1]
