"""The drop-in promise: what people do with a transformers BERT works, and gives the same."""

import copy
import inspect
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
import transformers
from forked import forked
from tiny import INPUTS, RIGHT, assert_as_good, pair, tiny_config

import fastbert
from fastbert.families import registry
from fastbert.families.family import EmbeddingParts
from fastbert.families.model import arguments_not_packed
from fastbert.families.obstacle import obstacle
from fastbert.ops.backend import interpreting

pytestmark = pytest.mark.usefixtures("on_torch")
REAL = RIGHT.bool()


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _forget_what_was_said(monkeypatch):
    monkeypatch.setattr("fastbert.families.obstacle._said", set())


def assert_same(theirs, ours, packed: bool = True):
    """Equal outputs, and by the path that is expected."""
    assert_as_good(theirs, ours(**INPUTS)[0])
    encoder = ours if isinstance(ours, fastbert.BertModel) else ours.bert
    assert (obstacle(encoder) is None) is packed


# Saving and loading


@pytest.mark.parametrize("head", ["BertModel", *registry.load("bert").heads])
def test_state_dict_and_files_are_transformers_own(head, tmp_path):
    theirs, ours = pair(head)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert isinstance(ours, getattr(transformers, head))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "ours/config.json").read_text())["architectures"] == [head]
    back = getattr(transformers, head).from_pretrained(tmp_path / "ours")
    forth = getattr(fastbert, head).from_pretrained(tmp_path / "theirs")
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor), key
        assert torch.equal(forth.state_dict()[key], tensor), key
    assert type(back) is getattr(transformers, head)


def test_loading_takes_the_options_of_transformers(tmp_path):
    pair("BertForMaskedLM")[0].save_pretrained(tmp_path)
    half = fastbert.BertForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    encoder, info = fastbert.BertModel.from_pretrained(
        tmp_path, add_pooling_layer=False, output_loading_info=True
    )
    assert encoder.pooler is None and not info["missing_keys"]
    classifier = fastbert.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert classifier.classifier.out_features == 5
    assert type(fastbert.BertModel(tiny_config())).__module__.startswith("fastbert")


def test_pickled_weights_load_only_when_asked_for(tmp_path):
    theirs, _ = pair("BertModel")
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        fastbert.BertModel.from_pretrained(tmp_path)
    ours = fastbert.BertModel.from_pretrained(tmp_path, use_safetensors=False).eval()
    assert_same(theirs, ours)


def test_unusable_checkpoints_are_errors(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        fastbert.BertModel.from_pretrained(tmp_path / "nowhere")
    pair("BertModel")[0].save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Exception, match=r"(?i)header|incomplete|buffer|safetensor"):
        fastbert.BertModel.from_pretrained(tmp_path)


def test_relative_positions_are_refused():
    """transformers 5 ignores the setting and computes something else."""
    config = tiny_config(position_embedding_type="relative_key")
    with pytest.raises(NotImplementedError, match="'relative_key'"):
        fastbert.BertModel(config)
    with pytest.raises(NotImplementedError, match="'relative_key'"):
        fastbert.accelerate(transformers.BertModel(config))


# accelerate


def test_accelerate_changes_one_instance_and_undoes():
    theirs, _ = pair("BertForSequenceClassification")
    model, other = copy.deepcopy(theirs), copy.deepcopy(theirs)
    parameters = [p.data_ptr() for p in model.parameters()]
    handle = fastbert.accelerate(model)
    assert handle.model is model and not handle.notes
    assert type(model) is fastbert.BertForSequenceClassification
    assert type(model.bert) is fastbert.BertModel
    assert type(other.bert) is transformers.BertModel
    assert [p.data_ptr() for p in model.parameters()] == parameters
    torch.testing.assert_close(model(**INPUTS).logits, theirs(**INPUTS).logits)
    assert fastbert.accelerate(model).changed == []  # idempotent
    assert handle.undo() is model and handle.undo() is model
    assert [type(m) for m in model.modules()] == [type(m) for m in theirs.modules()]
    with fastbert.accelerate(model) as inside:
        assert "bert.encoder.layer.0" in inside.changed
        assert type(model.bert) is fastbert.BertModel
    assert type(model.bert) is transformers.BertModel


def test_accelerate_finds_bert_inside_other_modules():
    theirs, _ = pair("BertModel")

    class Mine(torch.nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def forward(self, **inputs):
            return self.encoder(**inputs)[0]

    mine = Mine(copy.deepcopy(theirs))
    fastbert.accelerate(mine)
    assert type(mine.encoder) is fastbert.BertModel
    assert_as_good(theirs, mine(**INPUTS))


def test_accelerate_says_what_it_cannot_do(caplog):
    with pytest.raises(ValueError, match="encoder inside, got a Linear"):
        fastbert.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got str"):
        fastbert.accelerate("bert-base-uncased")
    theirs, _ = pair("BertModel", chunk_size_feed_forward=4)
    handle = fastbert.accelerate(theirs)
    assert handle.notes == ["BertModel: config.chunk_size_feed_forward is set"]
    assert "chunk_size_feed_forward" in caplog.text

    class Custom(transformers.BertModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    assert "subclass" in fastbert.accelerate(Custom(tiny_config())).notes[0]
    with pytest.raises(TypeError, match="call the model itself"):
        handle(**INPUTS)


# What people do with a model


def test_copies_and_pickles_are_ordinary_models():
    theirs, ours = pair("BertModel")
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is fastbert.BertModel
        assert_same(theirs, copied)
        copied.embeddings.word_embeddings.weight.zero_()
    assert_same(theirs, ours)


def test_changed_weights_are_seen_by_whatever_route():
    theirs, ours = pair("BertModel")
    ours(**INPUTS)
    state = {k: v + 0.01 for k, v in theirs.state_dict().items() if v.is_floating_point()}
    for change in (
        lambda m: m.encoder.layer[0].attention.self.query.weight.data.mul_(2),
        lambda m: m.encoder.layer[1].attention.self.value.bias.copy_(torch.ones(32)),
        lambda m: m.load_state_dict(state),
        lambda m: setattr(m.encoder.layer[0].output, "dense", torch.nn.Linear(64, 32)),
    ):
        for model in (theirs, ours):
            torch.manual_seed(5)
            change(model)
        assert_same(theirs, ours)


def test_dtype_moves_and_modes():
    theirs, ours = pair("BertModel")
    before = ours(**INPUTS)[0]
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert ours.to(dtype)(**INPUTS)[0].dtype == dtype
    ours = ours.float()
    ours.load_state_dict(theirs.state_dict())
    with torch.inference_mode():
        assert torch.equal(ours(**INPUTS)[0], before)
    with torch.enable_grad():
        assert ours(**INPUTS)[0].requires_grad
    assert not ours(**INPUTS)[0].requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = theirs(**INPUTS)[0], ours(**INPUTS)[0]
    assert actual.dtype == expected.dtype
    assert (actual - expected)[REAL].abs().max() < 0.1


FIRST_CALL = """
import fastbert, torch, transformers
torch._dynamo.config.error_on_recompile = True
sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 48, "vocab_size": 99}
ids = torch.ones(2, 5, dtype=torch.long)
for name in ("Bert", "Roberta"):
    torch._dynamo.reset()
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(fastbert, f"{name}Model")(config).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found = [run(ids, attention_mask=ids)[0] for run in (compiled, compiled, model, compiled)]
    torch.testing.assert_close(found[0], found[2])
"""


@pytest.mark.slow
def test_the_first_call_in_a_process_may_be_compiled():
    """What an ordinary call finds out and keeps is in a compiler's reach, and changes nothing that
    was compiled."""
    done = forked(FIRST_CALL)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_compile_is_one_graph_for_any_mask_and_shape():
    theirs, ours = pair("BertModel", num_hidden_layers=1)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    found = compiled(**INPUTS)[0]
    assert_as_good(theirs, found)
    assert not found[~REAL].any()
    smaller = {k: v[:3, :7] for k, v in INPUTS.items()}
    left = {**INPUTS, "attention_mask": RIGHT.flip(1)}
    for inputs in (smaller, left, {"input_ids": INPUTS["input_ids"]}):
        actual = compiled(**inputs)
        assert_as_good(theirs, actual[0], inputs)
        torch.testing.assert_close(actual.pooler_output, theirs(**inputs).pooler_output)
    with fastbert.backend("torch"):
        heads = torch.compile(
            pair("BertForMaskedLM", num_hidden_layers=1)[1], fullgraph=True, backend="aot_eager"
        )
        assert heads(**INPUTS, labels=INPUTS["input_ids"]).loss.isfinite()


@pytest.mark.slow
def test_export_gives_a_program_with_the_same_outputs():
    theirs, ours = pair("BertModel")
    args = (INPUTS["input_ids"], INPUTS["attention_mask"])
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2, max=40)
    shapes = ({0: batch, 1: length}, {0: batch, 1: length})
    program = torch.export.export(ours, args, dynamic_shapes=shapes, strict=False).module()
    for ids, mask in (args, (args[0][:2, :5], args[1][:2, :5])):
        inputs = {"input_ids": ids, "attention_mask": mask}
        assert_as_good(theirs, program(ids, mask)[0], inputs)


def test_inference_leaves_weights_where_they_are(tmp_path):
    """Aliases of every kind go on working: a teacher that shares ``.data``, one parameter in two
    places, parts of one buffer, a file of them."""
    import safetensors.torch

    _, ours = pair("BertModel")
    attention = ours.encoder.layer[0].attention.self
    attention.value.weight = attention.key.weight
    teacher = copy.deepcopy(ours)
    for mine, shared in zip(teacher.parameters(), ours.parameters(), strict=True):
        mine.data = shared.data
    before = [p.data_ptr() for p in ours.parameters()]
    for choice in ("torch", "triton") if interpreting() else ("torch",):
        with fastbert.backend(choice), torch.inference_mode():
            expected = ours(**INPUTS)[0]
        assert [p.data_ptr() for p in ours.parameters()] == before
        torch.testing.assert_close(teacher(**INPUTS)[0], expected, atol=1e-5, rtol=1e-5)
    safetensors.torch.save_model(ours, tmp_path / "model.safetensors")
    attention.query.weight.data.mul_(2)
    torch.testing.assert_close(teacher(**INPUTS)[0], ours(**INPUTS)[0])


def test_weights_of_another_layout_are_torchs_business():
    theirs, ours = pair("BertModel")
    for model in (theirs, ours):
        for layer in model.encoder.layer:
            for linear in (layer.intermediate.dense, layer.attention.self.query):
                sparse = linear.weight.masked_fill(linear.weight.abs() < 0.2, 0).to_sparse_csr()
                linear.weight = torch.nn.Parameter(sparse)
    torch.testing.assert_close(
        ours(**INPUTS)[0][REAL], theirs(**INPUTS)[0][REAL], atol=1e-4, rtol=1e-4
    )


# Hooks and replaced modules


@pytest.mark.parametrize(
    "path",
    ["encoder", "encoder.layer.1", "encoder.layer.0.attention.self", "embeddings", "pooler",
     "encoder.layer.0.output.dense", "embeddings.LayerNorm"],
)  # fmt: skip
def test_a_hook_sees_what_it_sees_in_transformers(path, caplog):
    theirs, ours = pair("BertModel")
    seen = {"theirs": [], "ours": []}
    for name, model in (("theirs", theirs), ("ours", ours)):

        def note(module, args, output, name=name):
            first = output[0] if isinstance(output, tuple | dict) else output
            seen[name].append(next(iter(output.values())) if isinstance(output, dict) else first)

        handle = model.get_submodule(path).register_forward_hook(note)
    assert_same(theirs, ours, packed=False)
    assert len(seen["ours"]) == 1
    torch.testing.assert_close(seen["ours"], seen["theirs"][:1])
    ours(**INPUTS)
    assert caplog.text.count("runs transformers' own code") == 1
    handle.remove()
    assert obstacle(ours) is None


def test_a_hook_may_change_values():
    theirs, ours = pair("BertModel")
    for model in (theirs, ours):
        model.encoder.layer[0].register_forward_hook(lambda m, args, output: output * 2)
    assert_same(theirs, ours, packed=False)


def test_hooks_on_the_model_itself_keep_the_fast_path():
    theirs, ours = pair("BertForMaskedLM")
    shapes = []
    for model in (theirs, ours):
        model.bert.register_forward_hook(lambda m, a, out: shapes.append(out[0].shape))
        model(**INPUTS)
    assert shapes[0] == shapes[1] == (4, 9, 32)
    assert obstacle(ours.bert) is None


def test_replaced_modules_that_work_row_by_row_are_called():
    theirs, ours = pair("BertModel")
    for model in (theirs, ours):
        torch.manual_seed(3)
        layer = model.encoder.layer[0]
        narrow = torch.nn.Sequential(
            torch.nn.Linear(32, 5), torch.nn.GELU(), torch.nn.Linear(5, 64)
        )
        layer.intermediate.dense = narrow
        layer.attention.self.query = torch.nn.utils.parametrizations.weight_norm(
            layer.attention.self.query
        )
        layer.output.LayerNorm = torch.nn.RMSNorm(32)
        layer.output.dropout = torch.nn.Identity()
        layer.intermediate.intermediate_act_fn = torch.nn.Tanh()
        model.embeddings.LayerNorm = torch.nn.Identity()
    assert_same(theirs, ours)


def test_a_replaced_part_is_called_as_transformers_calls_it():
    theirs, ours = pair("BertModel")
    for model in (theirs, ours):
        attention = model.encoder.layer[1].attention
        attention.output = copy.deepcopy(attention.output)
        attention.output.forward = lambda hidden, residual: hidden + residual
    assert_same(theirs, ours, packed=False)


def test_a_replaced_forward_of_a_layer_is_called_as_transformers_calls_it():
    theirs, ours = pair("BertModel")
    for model in (theirs, ours):
        layer = model.encoder.layer[0]
        layer.forward = lambda hidden, mask, *args, own=layer.forward, **kw: own(
            hidden, mask, *args, **kw
        ).tanh()
    assert_same(theirs, ours, packed=False)


def test_hidden_states_can_be_selected_by_index():
    from transformers.utils import output_capturing

    if not hasattr(output_capturing, "selected_hidden_states"):
        pytest.skip("this transformers has no selection by index")
    theirs, ours = pair("BertModel")
    expected = theirs(**INPUTS, output_hidden_states=1).hidden_states
    actual = ours(**INPUTS, output_hidden_states=1).hidden_states
    assert [h is None for h in actual] == [h is None for h in expected]
    torch.testing.assert_close(actual[1][REAL], expected[1][REAL])


def test_a_replaced_attention_runs_and_is_said(caplog):
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    calls = []

    def mine(*args, **kwargs):
        calls.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("mine", mine)
    _, ours = pair("BertModel")
    ours.config._attn_implementation = "mine"
    ours(input_ids=INPUTS["input_ids"])
    assert len(calls) == 2 and "attn_implementation='mine'" in caplog.text


# Modes that are not packed


def test_decoder_and_cross_attention_are_transformers_own():
    theirs, ours = pair("BertLMHeadModel", is_decoder=True)
    prompt = {"input_ids": INPUTS["input_ids"][:1, :4], "do_sample": False, "max_new_tokens": 5}
    assert torch.equal(theirs.generate(**prompt), ours.generate(**prompt))
    theirs, ours = pair("BertModel", is_decoder=True, add_cross_attention=True)
    options = {
        "encoder_hidden_states": torch.randn(4, 5, 32),
        "use_cache": True,
        "output_attentions": True,
    }
    expected, actual = theirs(**INPUTS, **options), ours(**INPUTS, **options)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual.cross_attentions, expected.cross_attentions)
    assert len(actual.past_key_values) == 2


NAMED = inspect.signature(transformers.BertModel.forward).parameters


@pytest.mark.parametrize("name", ["past_key_values", *{"cache"}.intersection(NAMED)])
def test_keys_and_values_in_front_are_never_left_out(name, caplog):
    """By the name that this version of transformers has for them, and by an older one."""
    theirs, ours = pair("BertModel")

    def given():  # transformers appends to it
        cache, generator = transformers.DynamicCache(), torch.Generator().manual_seed(0)
        for layer in range(2):
            cache.update(*torch.randn(2, 4, 2, 3, 16, generator=generator), layer)
        front = torch.ones(4, 3, dtype=torch.long)
        mask = torch.cat([front, INPUTS["attention_mask"]], 1)
        return {**INPUTS, "attention_mask": mask, name: cache}

    expected, actual = theirs(**given())[0], ours(**given())[0]
    torch.testing.assert_close(actual[REAL], expected[REAL])
    assert (expected - theirs(**INPUTS)[0])[REAL].abs().max() > 0.1
    assert "is not packed" in caplog.text


def test_an_argument_that_a_later_version_brings_is_transformers_own():
    class Later:
        def forward(self, input_ids, bbox=None, token_type_ids=None, *, news=None, **kwargs): ...

    sums = EmbeddingParts(further_inputs=("bbox",))
    found = arguments_not_packed(SimpleNamespace(model=Later, sums=sums))
    assert found == ("news", "past_key_values")
    decoding = {"encoder_hidden_states", "encoder_attention_mask", "past_key_values", "cache",
                "use_cache"}  # fmt: skip
    for name in registry.MODEL_TYPES:
        found = arguments_not_packed(registry.load(name))
        assert decoding.issuperset(found), f"{name} has a new one: can it be packed?"


def test_recording_works_on_the_fallback_too():
    theirs, ours = pair("BertModel")
    for model in (theirs, ours):
        model.encoder.layer[0].register_forward_hook(lambda *args: None)
    flags = {"output_hidden_states": True, "output_attentions": True}
    expected, actual = theirs(**INPUTS, **flags), ours(**INPUTS, **flags)
    zeros = [state.masked_fill(~REAL[..., None], 0) for state in expected.hidden_states]
    torch.testing.assert_close(actual.hidden_states, tuple(zeros))
    torch.testing.assert_close(actual.attentions, expected.attentions)
