"""Which models ``fastbert embed`` takes, and that each means what sentence-transformers says."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.constants import HF_HUB_CACHE
from test_embed import TEXTS, embedder_of, write_input

import fastbert
from fastbert.tasks.errors import LoadError

SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer
pytestmark = [pytest.mark.usefixtures("on_torch"), pytest.mark.slow]


def test_models_that_cannot_be_used(tiny_folder, tmp_path, run):
    source = write_input(tmp_path / "a.txt", ".txt")

    def fails_with(model, message, *options):
        code, _, err = run("embed", source, "-o", tmp_path / "o.npy", "--model", model, *options)
        assert code == 4 and message in err, err

    fails_with(tmp_path / "nowhere", "which does not exist")
    fails_with(tmp_path, "with config.json")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    fails_with(broken, "expected whole weights")
    state = fastbert.BertModel.from_pretrained(tiny_folder).state_dict()
    weights.unlink()
    fails_with(broken, "expected model.safetensors")
    torch.save(state, broken / "pytorch_model.bin")
    fails_with(broken, "pass --allow-pickle")
    code, _, err = run("embed", source, "-o", tmp_path / "p.npy", "--model", broken,
                       "--allow-pickle")  # fmt: skip
    assert code == 0, err
    missing = "encoder.layer.1.output.dense.weight"
    torch.save({k: v for k, v in state.items() if k != missing}, broken / "pytorch_model.bin")
    fails_with(broken, missing, "--allow-pickle")
    torch.save(state, broken / "pytorch_model.bin")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "deberta"}))
    fails_with(broken, "'deberta', which is not covered")
    (broken / "config.json").write_text(
        json.dumps({**config, "position_embedding_type": "relative_key"})
    )
    fails_with(broken, "'relative_key'", "--allow-pickle")
    (broken / "config.json").write_text("{")
    fails_with(broken, "expected JSON")
    loading = transformers.PreTrainedModel.from_pretrained.__func__
    assert loading.__module__ == "transformers.modeling_utils"  # what watches it is gone


def test_a_model_of_another_kind_says_what_it_is(tmp_path):
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    words = transformers.BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "a": 2})
    static = SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=4)], device="cpu")
    static.save_pretrained(str(tmp_path / "static"))
    with pytest.raises(LoadError, match="a transformers encoder inside, got a SentenceTransf"):
        embedder_of(tmp_path / "static")


def changed(folder, target, **files):
    """A copy of a model folder with other values in some JSON files; weights are shared."""
    shutil.copytree(folder, target, copy_function=os.link)
    for name, change in files.items():
        path = target / name.replace("__", "/").replace("_json", ".json")
        content = json.loads(path.read_text("utf-8")) if path.exists() else {}
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(change(content) or content), "utf-8")
    return target


def _set(**values):
    return lambda content: content.update(values)


def _cased(content):
    content["normalizer"]["lowercase"] = False


POOLING = "1_Pooling__config_json"
VARIANTS = {
    "as it is": {},
    "lower-casing asked for beside the tokenizer": {
        "sentence_bert_config_json": _set(do_lower_case=True),
        "tokenizer_config_json": _set(do_lower_case=False),
        "tokenizer_json": _cased,
    },
    "a default prompt": {
        "config_sentence_transformers_json": _set(
            prompts={"query": "query: "}, default_prompt_name="query"
        ),
    },
    "a default prompt that is not pooled": {
        "config_sentence_transformers_json": _set(
            prompts={"query": "a long one: "}, default_prompt_name="query"
        ),
        POOLING: _set(include_prompt=False),
    },
    "fewer values, of the first token": {
        "config_sentence_transformers_json": _set(truncate_dim=64),
        POOLING: _set(pooling_mode_cls_token=True, pooling_mode_mean_tokens=False),
    },
    "two poolings": {POOLING: _set(pooling_mode_max_tokens=True)},
    "a short maximum in the tokenizer": {
        "sentence_bert_config_json": lambda content: {"do_lower_case": False},
        "tokenizer_config_json": _set(model_max_length=17),
    },
}
AWKWARD = ["Hello World, the Quick Brown FOX", "word " * 300 + "the end differs", "x", "ein Weg"]


def test_a_folder_or_name_means_what_sentence_transformers_says(minilm_folder, tmp_path):
    """Changed copies of a real folder, by path and as a hub name in an offline cache."""
    names = []
    for number, (label, files) in enumerate(VARIANTS.items()):
        names.append(str(changed(minilm_folder, tmp_path / str(number), **files)))
        if label == "as it is":
            plain = changed(minilm_folder, tmp_path / "plain")
            (plain / "modules.json").unlink()
            names.append(str(plain))
            old = changed(minilm_folder, tmp_path / "old")
            inner = old / "0_Transformer"
            inner.mkdir()
            for path in [p for p in old.iterdir() if p.is_file() and p.name != "modules.json"
                         and not p.name.startswith("config_")]:  # fmt: skip
                path.rename(inner / path.name)
            modules = json.loads((old / "modules.json").read_text())
            modules[0]["path"] = "0_Transformer"
            (old / "modules.json").unlink()
            (old / "modules.json").write_text(json.dumps(modules))
            names.append(str(old))
        if label in ("as it is", "a default prompt"):  # what a folder is called is found out once
            cache = Path(HF_HUB_CACHE) / f"models--tiny-org--variant-{number}"
            (cache / "refs").mkdir(parents=True)
            (cache / "refs/main").write_text("a" * 40)
            changed(minilm_folder, cache / "snapshots" / ("a" * 40), **files)
            names.append(f"tiny-org/variant-{number}")
    assert len(names) == len(VARIANTS) + 4
    for name in names:
        expected = SentenceTransformer(name, device="cpu").encode(AWKWARD)
        actual = embedder_of(name).embed(AWKWARD)
        assert actual.shape == expected.shape and np.abs(actual - expected).max() < 1e-5, name


def test_dense_and_dropout_after_the_pooling(tiny_folder, tmp_path):
    from sentence_transformers.base.modules import Dense
    from sentence_transformers.sentence_transformer.modules import Dropout

    torch.manual_seed(0)
    model = SentenceTransformer(str(tiny_folder), device="cpu")
    model.append(Dropout(0.5))
    model.append(Dense(32, 7))
    model.save_pretrained(str(tmp_path / "model"))
    expected = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(TEXTS)
    actual = embedder_of(tmp_path / "model").embed(TEXTS)
    assert actual.shape == (3, 7) and np.abs(actual - expected).max() < 1e-5
    half = embedder_of(tmp_path / "model", dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16 and half.model[3].linear.weight.dtype == torch.float32
    assert np.abs(half.embed(TEXTS) - expected).max() < 0.05


def test_padding_on_the_left_is_kept(tiny_folder, tmp_path):
    folder = changed(tiny_folder, tmp_path / "left",
                     tokenizer_config_json=_set(padding_side="left"))  # fmt: skip
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    assert np.abs(embedder_of(folder).embed(TEXTS) - expected).max() < 1e-5


def test_without_sentence_transformers_it_says_what_to_install(tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(LoadError, match=r"pip install 'fastbert-triton\[embed\]'"):
        embedder_of(tiny_folder)


def test_the_digest_tells_models_apart(tiny_folder, tmp_path):
    digest = embedder_of(tiny_folder).digest()
    assert embedder_of(tiny_folder).digest() == digest
    embedder = embedder_of(tiny_folder)
    with torch.no_grad():
        embedder.model[0].model.embeddings.word_embeddings.weight[7, 3] += 1e-3
    assert embedder.digest() != digest
    cased = changed(tiny_folder, tmp_path / "other",
                    tokenizer_config_json=_set(do_lower_case=False))  # fmt: skip
    assert embedder_of(cased).digest() != digest
