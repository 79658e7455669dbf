"""sentence-transformers' pipelines around a model: multi-vector queries and SPLADE."""

import copy
import json
import multiprocessing
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
import transformers
from forked import context
from test_families import config_of
from test_family_tasks import roberta_tokenizer

import fastbert
from fastbert.families.model import PackedModel
from fastbert.testing import assert_within_budget

sentence_transformers = pytest.importorskip("sentence_transformers")
from sentence_transformers import MultiVectorEncoder, SparseEncoder  # noqa: E402
from sentence_transformers.base.modules import Router, Transformer  # noqa: E402
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Normalize  # noqa: E402
from sentence_transformers.sparse_encoder.modules import SpladePooling  # noqa: E402

pytestmark = pytest.mark.usefixtures("on_torch")
TEXTS = ["rome is a city", "the paris of word1 and the word2 of spain is word3 in madrid", "spain"]
MANY = [" ".join(text.split()[i:]) for text in TEXTS for i in range(min(len(text.split()), 9))] * 3


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """Tiny models with a masked-LM head."""
    found = {}
    for family, head in (("bert", "BertForMaskedLM"), ("roberta", "RobertaForMaskedLM"),
                         ("distilbert", "DistilBertForMaskedLM")):  # fmt: skip
        path = found[family] = tmp_path_factory.mktemp(family)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
        if family == "roberta":
            tokenizer = roberta_tokenizer()
        tokenizer.save_pretrained(path)
        torch.manual_seed(0)
        config = config_of(family, pad_token_id=tokenizer.pad_token_id)
        getattr(transformers, head)(config).save_pretrained(path)
    return found


# ---- multi-vector models ----


def multi_vector(folder, expansion) -> MultiVectorEncoder:
    first = Transformer(str(folder), query_expansion=expansion)
    return MultiVectorEncoder(modules=[first, MultiVectorMask(), Normalize()], device="cpu")


@pytest.mark.parametrize("attend", [False, True])
@pytest.mark.parametrize("strategy", ["fixed", "min"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_tokens_that_fill_up_a_query_have_their_vectors(family, strategy, attend, folders):
    expansion = {"strategy": strategy, "length": 12, "attend": attend, "token": None}
    model = multi_vector(folders[family], expansion)
    ways = {"query": model.encode_query, "document": model.encode_document}
    expected = {name: encode(MANY) for name, encode in ways.items()}
    wide = copy.deepcopy(model).double()
    exact = {name: getattr(wide, f"encode_{name}")(MANY) for name in ways}
    with fastbert.accelerate(model) as handle:
        assert not handle.notes and isinstance(model[0].model, PackedModel)
        found = {name: encode(MANY) for name, encode in ways.items()}
    assert min(map(len, found["query"])) == 12
    for name in ways:
        vectors = (torch.cat(each[name]) for each in (found, exact, expected))
        assert_within_budget(*vectors, name)


def test_documents_of_such_a_model_are_packed(folders, monkeypatch):
    rows = []
    encode = PackedModel._encoded
    monkeypatch.setattr(
        PackedModel, "_encoded", lambda self, x, *a: rows.append(len(x)) or encode(self, x, *a)
    )
    expansion = {"strategy": "fixed", "length": 12, "attend": False, "token": None}
    model = multi_vector(folders["bert"], expansion)
    tokens = sum(len(ids) for ids in model.tokenizer(TEXTS)["input_ids"])
    with fastbert.accelerate(model):
        model.encode_document(TEXTS)
        model.encode_query(TEXTS)
        model[0].query_expansion = None
        model.encode_query(TEXTS)
    assert rows == [tokens, 3 * 12, tokens]


# ---- SPLADE ----


def sparse(folder, **settings) -> SparseEncoder:
    first = Transformer(str(folder), transformer_task="fill-mask")
    return SparseEncoder(modules=[first, SpladePooling(**settings)], device="cpu")


def dense(model, texts=TEXTS) -> torch.Tensor:
    return model.encode(texts, convert_to_sparse_tensor=False)


@pytest.fixture
def splades(monkeypatch):
    """How often vectors were made without logits."""
    from fastbert.families.masked_lm import MaskedLMHead

    calls, splade = [], MaskedLMHead.splade
    monkeypatch.setattr(
        MaskedLMHead, "splade", lambda self, **given: calls.append(1) or splade(self, **given)
    )
    return calls


@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_vectors_of_a_sparse_encoder(family, activation, pooling, folders, splades):
    model = sparse(folders[family], pooling_strategy=pooling, activation_function=activation)
    expected, exact = dense(model, MANY), dense(copy.deepcopy(model).double(), MANY)
    with fastbert.accelerate(model) as handle:
        assert handle.changed and not handle.notes
        assert_within_budget(dense(model, MANY), exact, expected, "vectors")
        assert len(splades) == 2, "batches of 32 texts"
    assert torch.equal(dense(model, MANY), expected) and len(splades) == 2
    assert type(model) is SparseEncoder and type(model[0]) is Transformer


def test_copies_pickles_and_folders_of_it(folders, tmp_path, splades):
    model = sparse(folders["bert"])
    expected = dense(model)
    fastbert.accelerate(model)
    found = dense(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(dense(other), found)
    assert len(splades) == 3
    model.save_pretrained(str(tmp_path / "saved"))
    types = json.loads((tmp_path / "saved/modules.json").read_text())
    assert all(each["type"].startswith("sentence_transformers.") for each in types)
    assert torch.equal(dense(SparseEncoder(str(tmp_path / "saved"), device="cpu")), expected)


def test_a_router_with_a_sparse_encoder_for_documents(folders, splades):
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

    first = Transformer(str(folders["bert"]), transformer_task="fill-mask")
    router = Router.for_query_document(
        query_modules=[SparseStaticEmbedding(tokenizer=first.tokenizer)],
        document_modules=[first, SpladePooling()],
    )
    model = SparseEncoder(modules=[router], device="cpu")
    ways = (model.encode_document, model.encode_query)
    expected = [encode(TEXTS, convert_to_sparse_tensor=False) for encode in ways]
    with fastbert.accelerate(model):
        for encode, vectors in zip(ways, expected, strict=True):
            found = encode(TEXTS, convert_to_sparse_tensor=False)
            torch.testing.assert_close(found, vectors, rtol=1e-4, atol=1e-5)
    assert len(splades) == 1


def test_what_stands_between_gets_logits(folders, splades):
    """And what is not plain SPLADE gets what it expects."""
    first = Transformer(str(folders["bert"]), transformer_task="fill-mask")
    seen = []

    class Own(SpladePooling):
        def forward(self, features):
            seen.append(features["token_embeddings"].shape[-1])
            return super().forward(features)

    model = SparseEncoder(modules=[first, Own()], device="cpu")
    expected = dense(model)
    with fastbert.accelerate(model):
        torch.testing.assert_close(dense(model), expected, rtol=1e-4, atol=1e-5)
    assert seen == [99, 99] and not splades


@pytest.mark.slow
def test_compiled_or_alone_it_gives_logits(folders, splades):
    model = sparse(folders["distilbert"])
    expected = dense(model)
    fastbert.accelerate(model)
    features = model.preprocess(TEXTS)
    logits = model[0](dict(features))["token_embeddings"]
    assert logits.shape == (*features["input_ids"].shape, 99)
    torch._dynamo.reset()
    model.compile(backend="eager")
    torch.testing.assert_close(dense(model), expected, rtol=1e-4, atol=1e-5)
    assert not splades


def test_training_has_the_gradients(folders, splades):
    model = sparse(folders["distilbert"]).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    features = model.preprocess(TEXTS)

    def gradients(of):
        of.zero_grad()
        vectors = of(dict(features))["sentence_embedding"]
        F.cosine_similarity(vectors[:1], vectors[1:]).sum().backward()
        return [p.grad.clone() for p in of.parameters() if p.grad is not None]

    expected, exact = gradients(model), gradients(copy.deepcopy(model).double())
    with fastbert.accelerate(model):
        found = gradients(model)
    assert len(splades) == 1 and len(found) == len(expected)
    for mine, theirs, oracle in zip(found, expected, exact, strict=True):
        if mine.numel() > 16:
            assert_within_budget(mine, oracle, theirs, "gradients")


@pytest.mark.slow
def test_its_own_trainer_trains_the_same(folders, tmp_path, splades):
    """SPLADE's loss, with the regularisation that makes vectors sparse."""
    import datasets
    from sentence_transformers.sparse_encoder import (
        SparseEncoderTrainer,
        SparseEncoderTrainingArguments,
        losses,
    )

    rows = datasets.Dataset.from_dict({"anchor": MANY[:8], "positive": MANY[8:16]})

    def trained(accelerated: bool) -> SparseEncoder:
        model = sparse(folders["distilbert"])
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if accelerated:
            fastbert.accelerate(model)
        arguments = SparseEncoderTrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, max_steps=4, learning_rate=1e-2,
            optim="sgd", report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        loss = losses.SpladeLoss(
            model, losses.SparseMultipleNegativesRankingLoss(model),
            document_regularizer_weight=0.1, query_regularizer_weight=0.1,
        )  # fmt: skip
        SparseEncoderTrainer(model, arguments, train_dataset=rows, loss=loss).train()
        return model

    before = sparse(folders["distilbert"])
    plain, ours = trained(False), trained(True)
    assert len(splades) == 8
    for first, one, other in zip(*map(list, (before.parameters(), plain.parameters(),
                                             ours.parameters())), strict=True):  # fmt: skip
        moved = (one - first).abs().max()
        assert (one - other).abs().max() <= 2e-3 * moved + 1e-7


def test_undone_while_another_thread_encodes(folders):
    model = sparse(folders["bert"])
    expected, failed = dense(model), []
    done = threading.Event()

    def encodes():
        while not done.is_set():
            try:
                torch.testing.assert_close(dense(model), expected, rtol=1e-4, atol=1e-5)
            except Exception as error:
                failed.append(error)

    thread = threading.Thread(target=encodes)
    thread.start()
    for _ in range(20):
        fastbert.accelerate(model).undo()
    done.set()
    thread.join()
    assert not failed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_pool_of_processes_encodes_the_same(kind, folders, monkeypatch):
    """Each gets the accelerated model, pickled; of dense ones in a process that starts anew."""
    if kind == "sparse":
        model, options = sparse(folders["distilbert"]), {"convert_to_sparse_tensor": False}
        processes = context()
        monkeypatch.setattr(multiprocessing, "get_context", lambda kind: processes)
    else:
        model, options = sentence_transformers.SentenceTransformer(str(folders["roberta"])), {}
        options = {"convert_to_tensor": True}
    expected = model.to("cpu").encode(TEXTS, **options)
    fastbert.accelerate(model)
    pool = model.start_multi_process_pool(["cpu"])
    try:
        found = model.encode(TEXTS, pool=pool, chunk_size=2, **options)
    finally:
        model.stop_multi_process_pool(pool)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
