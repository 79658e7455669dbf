"""The real all-MiniLM-L6-v2 weights on a CPU, within 1e-5 of transformers."""

import numpy as np
import pytest
import torch
import transformers

import fastbert
from fastbert.demo import passages
from fastbert.tasks.embed import Embedder

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("on_torch")]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def models(minilm_folder):
    theirs = transformers.BertModel.from_pretrained(minilm_folder, attn_implementation="sdpa")
    return theirs.eval(), fastbert.BertModel.from_pretrained(minilm_folder).eval()


@pytest.fixture(scope="module")
def batch(minilm_folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder)
    texts = [passage["text"] for passage in passages()[:24]]
    return tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")


@pytest.mark.slow
def test_hidden_states_and_pooled_output(models, batch):
    theirs, ours = models
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = theirs(**batch, output_hidden_states=True)
        actual = ours(**batch, output_hidden_states=True)
    assert len(actual.hidden_states) == 7
    for a, b in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert (a - b)[real].abs().max() < TOLERANCE
    assert (actual.pooler_output - expected.pooler_output).abs().max() < TOLERANCE


@pytest.mark.slow
def test_attention_weights(minilm_folder, models, batch):
    eager = transformers.BertModel.from_pretrained(minilm_folder, attn_implementation="eager")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = eager.eval()(**batch, output_attentions=True).attentions
        actual = models[1](**batch, output_attentions=True).attentions
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).transpose(1, 2)[real].abs().max() < TOLERANCE


@pytest.mark.slow
def test_embeddings_match_sentence_transformers(minilm_folder):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = [passage["text"] for passage in passages()[:40]]
    stock = sentence_transformers.SentenceTransformer(str(minilm_folder), device="cpu")
    expected = stock.encode(texts)
    with fastbert.accelerate(stock) as handle:
        accelerated = stock.encode(texts)
        assert any("layer" in name for name in handle.changed)
    ours = Embedder.load(minilm_folder, device=torch.device("cpu")).embed(texts, batch_tokens=500)
    assert np.abs(accelerated - expected).max() < TOLERANCE
    assert np.abs(ours - expected).max() < TOLERANCE


def test_a_cross_encoder_is_accelerated(minilm_folder):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = sentence_transformers.CrossEncoder(str(minilm_folder), num_labels=1, device="cpu")
    pairs = [("a short question", p["text"]) for p in passages()[:12]]
    expected = encoder.predict(pairs)
    with fastbert.accelerate(encoder):
        actual = encoder.predict(pairs)
    assert np.abs(actual - expected).max() < TOLERANCE


def test_real_weights_survive_a_round_trip(models, tmp_path):
    theirs, ours = models
    ours.save_pretrained(tmp_path)
    back = transformers.BertModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(back[k], v) for k, v in theirs.state_dict().items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # peft calls an old name
def test_pipeline_and_lora_run_packed(minilm_folder, models, batch):
    peft = pytest.importorskip("peft")
    theirs, ours = models
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder)
    extract = transformers.pipeline("feature-extraction", model=ours, tokenizer=tokenizer)
    assert np.array(extract("packed and quick")).shape == (1, 5, 384)
    config = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    torch.manual_seed(3)
    adapted = peft.get_peft_model(
        transformers.BertModel.from_pretrained(minilm_folder), config
    ).eval()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = adapted(**batch)[0]
        with fastbert.accelerate(adapted) as handle:
            assert not handle.notes
            actual = adapted(**batch)[0]
    assert (actual - expected)[real].abs().max() < TOLERANCE
    assert (expected - theirs(**batch)[0])[real].abs().max() > 1e-3  # the adapter does something


@pytest.mark.slow
def test_threads_and_order_do_not_change_embeddings(minilm_folder):
    embedder = Embedder.load(minilm_folder, device=torch.device("cpu"))
    texts = [passage["text"] for passage in passages()[:30]]
    whole = embedder.embed(texts)
    backwards = embedder.embed(texts[::-1], batch_tokens=64)[::-1]
    assert np.abs(whole - backwards).max() < TOLERANCE
    streamed = np.concatenate(list(embedder.stream(iter(texts), window=7)))
    assert np.abs(whole - streamed).max() < TOLERANCE
