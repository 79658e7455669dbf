"""Every family and every head of it against transformers, from the one list of families."""

import inspect
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
import transformers
from fastbert.benchmarks.readme import rendered
from forked import forked
from test_model_parity import FLAGS, MASKS, check
from tiny import RIGHT, one_is_quick, specified_by
from torch._subclasses.fake_tensor import FakeTensorMode

import fastbert
from fastbert.families import mpnet, registry, table
from fastbert.families.obstacle import obstacle
from fastbert.ops import onednn
from fastbert.testing import assert_matches
from fastbert.training import PackedCollator

OTHERS = [name for name in registry.MODEL_TYPES if name != "bert"]  # that is tested by itself
HEADS = [(family, head) for family in OTHERS for head in
         (registry.load(family).model.__name__, *registry.load(family).heads)]  # fmt: skip
# Their code is RoBERTa's under other names.
SAME = ("xlm-roberta", "camembert", "data2vec-text")
# The quick loop goes without these too, and has one like each of them.
ALIKE = (*SAME, "ernie", "layoutlm", "bert-generation", "megatron-bert", "xlm-roberta-xl")


def quick(cases):
    """Cases as parameters, those of families that are `ALIKE` marked slow."""
    families = [case[0] if isinstance(case, tuple) else case for case in cases]
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=[pytest.mark.slow] * (family in ALIKE),
        )
        for case, family in zip(cases, families, strict=True)
    ]


WITH_LABELS = [pair for pair in HEADS if "For" in pair[1] and not pair[1].endswith("ForCausalLM")]
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "vocab_size": 99, "max_position_embeddings": 40, "initializer_range": 0.3, "pad_token_id": 1,
}  # fmt: skip
NAMES = {  # where a family's configuration has others
    "distilbert": {"hidden_size": "dim", "num_hidden_layers": "n_layers",
                   "num_attention_heads": "n_heads", "intermediate_size": "hidden_dim"},
}  # fmt: skip
MORE = {
    "ernie": {"use_task_id": True},
    "electra": {"embedding_size": 16, "type_vocab_size": 2},
    "albert": {"embedding_size": 16, "num_hidden_layers": 3, "num_hidden_groups": 2},
}


def config_of(family, **changes):
    sizes = {NAMES.get(family, {}).get(name, name): value for name, value in SIZES.items()}
    options = {**sizes, **MORE.get(family, {}), "attn_implementation": "eager", **changes}
    return registry.load(family).config(**options)


def pair_of(family, head, device="cpu", **changes):
    """transformers' model and ours with the same weights."""
    torch.manual_seed(0)
    theirs = getattr(transformers, head)(config_of(family, **changes)).eval().to(device)
    ours = getattr(fastbert, head)(config_of(family, **changes)).eval().to(device)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs_of(head, mask, device="cpu"):
    """Ids with padding where there is none; token types for models that take some."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 99, (4, 9), generator=generator)
    inputs = {"input_ids": ids if mask is None else ids.where(mask.bool(), 1)}
    inputs["attention_mask"] = mask
    types = torch.zeros(4, 9, dtype=torch.long)
    if "token_type_ids" in inspect.signature(getattr(fastbert, head).forward).parameters:
        inputs["token_type_ids"] = types
    if head.endswith("MultipleChoice"):
        inputs = {k: None if v is None else v.view(2, 2, 9) for k, v in inputs.items()}
    return {k: None if v is None else v.to(device) for k, v in inputs.items()}


def labels_for(head, config):
    generator = torch.Generator().manual_seed(2)
    if head.endswith("QuestionAnswering"):
        return {"start_positions": torch.tensor([1, 0, 0, 5]),
                "end_positions": torch.tensor([8, 3, 0, 6])}  # fmt: skip
    if head.endswith("MultipleChoice"):
        return {"labels": torch.tensor([1, 0])}
    if head.endswith(("SequenceClassification", "NextSentencePrediction")):
        return {"labels": torch.tensor([1, 0, 0, 1])}
    many = {"MaskedLM": config.vocab_size}.get(head.split("For")[-1], 2)
    labels = torch.randint(0, many, (4, 9), generator=generator)
    found = {"labels": labels.masked_fill(RIGHT == 0, -100)}
    arguments = inspect.signature(getattr(fastbert, head).forward).parameters
    for name in ("sentence_order_label", "next_sentence_label"):
        if name in arguments:
            found[name] = torch.tensor([1, 0, 0, 1])
    return found


def test_the_table_in_the_readme_is_what_the_registry_says():
    """``python -m fastbert.families.table README.md`` writes it."""
    text = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    assert table.written_into(text) == text


@pytest.mark.slow
def test_families_are_compared_behind_a_check(tmp_path):
    program = "from fastbert.benchmarks import families; families._SIZES['num_hidden_layers'] = 1"
    program += "; families._SEQUENCES = 4; families.main()"
    options = "--seconds", "0", "--device", "cpu"
    done = forked(program, *options, "distilbert")
    assert done.returncode == 0, done.stderr[-2000:]
    _, distilbert = done.stdout.splitlines()
    assert re.search(r"distilbert: [\d.]+x sdpa, 5 rounds; 1 / fill is 1.98", distilbert)
    done = forked(program, *options, "mpnet", "--json")
    found = json.loads(done.stdout)
    assert (found["model_type"], found["attention"], found["rounds"]) == ("mpnet", "eager", 5)
    (tmp_path / "families-1.jsonl").write_text(done.stdout, "utf-8")
    written = rendered((Path(__file__).parents[1] / "README.md").read_text("utf-8"), tmp_path)
    assert f"| mpnet | eager | **{found['ratio']:.2f}x** | 1.98x |" in written


@pytest.mark.parametrize(
    "mask",
    one_is_quick(["hole", "right", "none", "ones", "left"]),
)
@pytest.mark.parametrize(("family", "head"), quick(HEADS))
def test_head_matches_transformers(family, head, mask, on_torch, caplog, monkeypatch):
    monkeypatch.setattr("fastbert.families.obstacle._said", set())
    theirs, ours = pair_of(family, head)
    assert obstacle(ours.base_model) is None
    inputs = inputs_of(head, MASKS[mask])
    real = None if inputs["attention_mask"] is None else MASKS[mask].bool()
    with torch.no_grad():
        actual = ours(**inputs, **FLAGS)
        assert list(actual) == list(theirs(**inputs, **FLAGS))
        assert not [r for r in caplog.records if r.name == "fastbert"], "it was packed"
        plain = ours(**inputs)  # what is not watched takes another way
        assert list(plain) == list(theirs(**inputs))
        check(actual, theirs, real, head, plain, **inputs, **FLAGS)


@pytest.mark.parametrize(("family", "head"), quick(WITH_LABELS))
def test_gradients_match_transformers(family, head, on_torch):
    theirs, ours = pair_of(family, head)
    inputs = {**inputs_of(head, RIGHT), **labels_for(head, theirs.config)}
    names = [name for name, _ in theirs.named_parameters()]

    def gradients(model):
        model.zero_grad()
        model(**inputs).loss.backward()
        found = dict(model.named_parameters())
        return [found[name].grad for name in names]

    ran = [name for name, grad in zip(names, gradients(theirs), strict=True) if grad is not None]
    assert [n for n, g in zip(names, gradients(ours), strict=True) if g is not None] == ran
    specification, parameters = specified_by(theirs, lambda output: [output.loss], **inputs)
    chosen = [names.index(name) for name in ran]

    def specified(*given):
        given = [g.detach().requires_grad_() for g in given]
        with torch.enable_grad():
            (loss,) = specification(*given)
            return torch.autograd.grad(loss, [given[i] for i in chosen])

    actual = gradients(ours)
    assert_matches([actual[i] for i in chosen], specified, parameters, head)


@pytest.mark.parametrize("each_backend", ["triton"], indirect=True)
@pytest.mark.parametrize("family", quick(OTHERS))
def test_the_kernels_match_transformers(family, device, each_backend):
    head = registry.load(family).model.__name__
    theirs, ours = pair_of(family, head, device)
    inputs = inputs_of(head, RIGHT, device)
    with torch.no_grad():
        check(ours(**inputs), theirs, RIGHT.bool().to(device), head, **inputs)


@pytest.mark.parametrize(
    ("family", "head"), quick([pair for pair in HEADS if "MaskedLM" in pair[1]])
)
def test_the_kernels_give_the_embeddings_gradients(family, head, device):
    """A row of padding in the position table learns nothing."""
    inputs = {**inputs_of(head, RIGHT, device), "labels": RIGHT.to(device)}
    theirs, ours = pair_of(family, head, device)
    theirs(**inputs).loss.backward()
    with fastbert.backend("triton"):
        ours(**inputs).loss.backward()
    found, right = (dict(m.base_model.embeddings.named_parameters()) for m in (ours, theirs))
    for name, parameter in right.items():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "head"), quick([pair for pair in HEADS if "MaskedLM" in pair[1]])
)
def test_labelled_rows_give_the_loss_of_all_logits(family, head, on_torch):
    theirs, ours = pair_of(family, head)
    inputs = {**inputs_of(head, RIGHT), **labels_for(head, theirs.config)}
    output = ours(**inputs, skip_logits=True)
    specification, parameters = specified_by(
        theirs, lambda output: [output.loss.repeat(16)], **inputs
    )
    assert output.logits is None and output.num_correct is not None
    with torch.no_grad():
        assert_matches([output.loss.repeat(16)], specification, parameters, head)
    output.loss.backward()
    found = [p.grad for p in ours.parameters()]
    ours.zero_grad()
    ours(**inputs).loss.backward()
    for one, other in zip(found, (p.grad for p in ours.parameters()), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("family", "head"),
    [
        pair
        for pair in HEADS
        if not pair[1].endswith(("Choice", "CausalLM", "Decoder", "Training", "Prediction"))
    ],
)
def test_packed_sequences_are_those_of_a_padded_batch(family, head, on_torch):
    """``cu_seq_lens_q`` with positions as the family counts them; a head that reads the first token
    reads that of each sequence."""
    _, ours = pair_of(family, head)
    inputs = inputs_of(head, RIGHT)
    real, lengths = RIGHT.bool(), RIGHT.sum(1)
    first = ours.family.sums.first_position(ours.base_model.embeddings)
    packed = {
        "input_ids": inputs["input_ids"][real][None],
        "position_ids": (first + torch.arange(9).expand(4, 9)[real])[None],
        "cu_seq_lens_q": torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
    }
    with torch.no_grad():
        expected, found = ours(**inputs), ours(**packed)
    for name, value in expected.items():
        by_token = value.shape[:2] == real.shape
        torch.testing.assert_close(
            found[name][0] if by_token else found[name], value[real] if by_token else value
        )


@pytest.mark.parametrize("family", quick(OTHERS))
def test_accelerate_and_back(family, on_torch, tmp_path):
    known = registry.load(family)
    tags = (name for name in known.heads if name.endswith("TokenClassification"))
    head = next(tags, known.model.__name__)
    theirs, ours = pair_of(family, head)
    inputs = inputs_of(head, RIGHT)
    before = type(theirs)
    with torch.no_grad():
        expected = ours(**inputs)[0]
        with fastbert.accelerate(theirs):
            assert type(theirs) is type(ours) and torch.equal(theirs(**inputs)[0], expected)
            again = pickle.loads(pickle.dumps(theirs))
            assert torch.equal(again(**inputs)[0], expected)
        assert type(theirs) is before
        theirs.save_pretrained(tmp_path / "theirs")
        ours.save_pretrained(tmp_path / "ours")
        loaded = getattr(fastbert, head).from_pretrained(tmp_path / "theirs")
        assert torch.equal(loaded(**inputs)[0], expected)
        back = getattr(transformers, head).from_pretrained(tmp_path / "ours").state_dict()
        assert all(torch.equal(value, back[name]) for name, value in ours.state_dict().items())
        frozen = getattr(fastbert, head).from_pretrained(tmp_path / "ours", frozen=True)
        torch.testing.assert_close(frozen(**inputs)[0], expected)
        assert (frozen.base_model.frozen.nbytes > 0) == onednn.available()
        with pytest.raises(
            ValueError, match=f"expected a checkpoint of type 'bert', got '{family}'"
        ):
            fastbert.BertModel.from_pretrained(tmp_path / "ours")


@pytest.mark.parametrize("family", [f for f in OTHERS if registry.load(f).sums.counts_tokens])
def test_positions_count_tokens(family, on_torch):
    """Ids that are padding have no number, wherever they are; as many as there are positions fit,
    however long the row is."""
    head = registry.load(family).model.__name__
    theirs, ours = pair_of(family, head)
    ids = torch.randint(5, 99, (2, 60), generator=torch.Generator().manual_seed(3))
    ids[:, 38:] = 1
    ids[0, 5:9] = 1
    inputs = {"input_ids": ids, "attention_mask": (ids != 1).long()}
    with torch.no_grad():
        check(ours(**inputs), theirs, ids != 1, head, **inputs)
        embeds = ours.embeddings.word_embeddings(ids[:, :30])
        check(ours(inputs_embeds=embeds), theirs, None, head, inputs_embeds=embeds)
        with pytest.raises(ValueError, match=r"at most 38 tokens a sequence.* got 39"):
            ours(input_ids=torch.full((1, 39), 7))


@pytest.mark.parametrize(
    "family",
    [f if f == "mpnet" else pytest.param(f, marks=pytest.mark.slow) for f in OTHERS
     if f not in (*SAME, "megatron-bert", "xlm-roberta-xl")],  # layers of RoBERTa-PreLayerNorm
)  # fmt: skip
def test_compile_and_export_are_one_graph(family, on_torch):
    """Exported are those whose inputs have ways of their own; what is traced is the same."""
    head = registry.load(family).model.__name__
    layers = NAMES.get(family, {}).get("num_hidden_layers", "num_hidden_layers")
    theirs, ours = pair_of(family, head, **{layers: 2 if family == "albert" else 1})
    inputs = inputs_of(head, RIGHT)
    torch._dynamo.reset()
    traced = [torch.compile(ours, fullgraph=True, backend="eager")]
    if family in ("distilbert", "mpnet", "roberta"):
        traced.append(torch.export.export(ours, (), dict(inputs), strict=False).module())
    with torch.no_grad():
        first, *others = (program(**inputs) for program in traced)
    check(first, theirs, RIGHT.bool(), head, *others, **inputs)


def test_the_buckets_of_mpnet_are_found_once_for_each_length(monkeypatch, on_torch):
    """And in inference first, whose tensors training cannot read."""
    monkeypatch.setattr(mpnet, "_buckets", {})
    theirs, ours = pair_of("mpnet", "MPNetModel")
    found, find = [], ours.encoder.relative_position_bucket
    monkeypatch.setattr(
        ours.encoder,
        "relative_position_bucket",
        lambda *args, **kw: found.append(1) or find(*args, **kw),
    )
    for length in (7, 9, 7):
        ids = torch.full((2, length), 5)
        with torch.inference_mode():
            check(ours(input_ids=ids), theirs, None, "MPNetModel", input_ids=ids)
        ours(input_ids=ids).last_hidden_state.sum().backward()
    assert len(found) == 2
    with FakeTensorMode():  # whose weights take no real buckets, and real ones none of its own
        for length in (7, 11):
            fastbert.MPNetModel(config_of("mpnet"))(input_ids=torch.full((2, length), 5))
    ours(input_ids=torch.full((2, 11), 5))


def test_a_bias_in_the_scores_lies_by_rows():
    """Otherwise the kernels copy it in every layer, forward and backward."""
    biased = [name for name in OTHERS if registry.load(name).score_bias is not None]
    assert biased
    for name in biased:
        family = registry.load(name)
        _, ours = pair_of(name, family.model.__name__)
        assert family.score_bias(ours, 9).is_contiguous()


@pytest.mark.parametrize(
    ("family", "head"), quick([pair for pair in HEADS if "Sequence" in pair[1]])
)
def test_low_rank_updates_and_a_head_that_peft_saves_whole(family, head, on_torch):
    peft = pytest.importorskip("peft")
    models = pair_of(family, head)
    query = registry.load(family).parts.query.rpartition(".")[2]
    config = peft.LoraConfig(
        r=2, target_modules=[query], modules_to_save=["classifier"], init_lora_weights=False
    )
    theirs, ours = (peft.get_peft_model(model, config).eval() for model in models)
    ours.load_state_dict(theirs.state_dict())
    inputs = inputs_of(head, RIGHT)
    assert obstacle(ours.base_model.model.base_model) is None
    with torch.no_grad():
        check(ours(**inputs), theirs, RIGHT.bool(), head, **inputs)


@pytest.mark.parametrize("name", ["DPRContextEncoder", "DPRQuestionEncoder", "DPRReader"])
def test_dpr_has_a_bert_inside(name, on_torch):
    config = transformers.DPRConfig(**SIZES)
    theirs, ours = (getattr(transformers, name)(config).eval() for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    handle = fastbert.accelerate(ours)
    assert handle.changed and not handle.notes
    inputs = {k: v for k, v in inputs_of("BertModel", RIGHT).items() if k != "token_type_ids"}
    real = RIGHT.bool()
    with torch.no_grad():
        actual, specification = ours(**inputs), specified_by(theirs, list_of(real), **inputs)
        assert_matches(list_of(real)(actual), *specification, name)


def list_of(real):
    """An output's tensors, those by token at tokens alone."""

    def read(output):
        return [t[real] if t.shape[:2] == real.shape else t for t in output.to_tuple()]

    return read


def test_tasks_of_ernie(on_torch):
    theirs, ours = pair_of("ernie", "ErnieModel")
    inputs = inputs_of("ErnieModel", RIGHT)
    tasks = torch.randint(0, 3, (4, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        actual = ours(**inputs, task_type_ids=tasks)
        check(actual, theirs, RIGHT.bool(), "tasks", **inputs, task_type_ids=tasks)
        assert not torch.equal(actual[0], ours(**inputs)[0])
    theirs, ours = pair_of("ernie", "ErnieModel", use_task_id=False)
    with torch.no_grad():
        check(ours(**inputs), theirs, RIGHT.bool(), "no tasks", **inputs)


def test_boxes(on_torch):
    theirs, ours = pair_of("layoutlm", "LayoutLMModel", max_2d_position_embeddings=20)
    inputs = inputs_of("LayoutLMModel", RIGHT)
    corners = torch.randint(0, 10, (4, 9, 2), generator=torch.Generator().manual_seed(3))
    boxes = torch.cat((corners, corners + torch.arange(2, 11)[:, None]), -1)
    with torch.no_grad():
        actual = ours(**inputs, bbox=boxes)
        check(actual, theirs, RIGHT.bool(), "boxes", **inputs, bbox=boxes)
        assert not torch.equal(actual[0], ours(**inputs)[0])
        alone = ours(**{k: v[:1] for k, v in inputs.items()}, bbox=boxes[:1])
        torch.testing.assert_close(alone[0], actual[0][:1], rtol=1e-4, atol=1e-5)
    with pytest.raises(IndexError, match=r"sizes from 0 to 19, got boxes from \[.*\] to \["):
        ours(**inputs, bbox=boxes * torch.tensor([1, 1, 1, 2]))


@pytest.mark.parametrize("family", ["roberta", "electra"])
def test_packed_batches_begin_where_a_families_positions_do(family, on_torch):
    head = registry.load(family).model.__name__
    _, ours = pair_of(family, head)
    inputs = inputs_of(head, RIGHT)
    real = RIGHT.bool()
    examples = [
        {"input_ids": ids[keep]} for ids, keep in zip(inputs["input_ids"], real, strict=True)
    ]
    batch = PackedCollator(ours)(examples)
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch)[0][0], ours(**inputs)[0][real])
