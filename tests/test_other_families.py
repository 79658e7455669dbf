"""Checkpoints and names of other families than asked for: refused, or transformers' own."""

import pytest
import torch
import transformers

import fastbert

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "vocab_size": 99,
}  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("BertModel", "RobertaModel"), ("BertForMaskedLM", "RobertaForMaskedLM"),
     ("BertForSequenceClassification", "RobertaForSequenceClassification")],
)  # fmt: skip
def test_a_checkpoint_of_another_family_is_refused(ours, theirs, tmp_path):
    """Its weights would fit, and its positions would be others."""
    config = transformers.RobertaConfig(**SIZES)
    getattr(transformers, theirs)(config).save_pretrained(tmp_path)
    message = f"type 'bert', got 'roberta' .*fastbert.{theirs} is the class"
    with pytest.raises(ValueError, match=message):
        getattr(fastbert, ours).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        getattr(fastbert, ours).from_pretrained(tmp_path, config=config)
    with pytest.raises(ValueError, match="BertConfig, got a RobertaConfig"):
        getattr(fastbert, ours)(config)


def test_a_config_of_ones_own_loads(tmp_path):
    class MyConfig(transformers.BertConfig):
        model_type = "my-bert"

    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path)
    config = MyConfig(**SIZES)
    loaded = fastbert.BertModel.from_pretrained(tmp_path, config=config)
    assert type(loaded.config) is MyConfig
    assert fastbert.BertModel(config).config.model_type == "my-bert"


def test_accelerate_names_what_it_found():
    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = transformers.DebertaForMaskedLM(transformers.DebertaConfig(**SIZES))

    with pytest.raises(ValueError, match="got one with a DebertaModel; covered are bert, roberta"):
        fastbert.accelerate(Mine())


def test_what_stands_beside_a_model_is_transformers_own():
    from fastbert import AutoTokenizer, BertConfig, BertTokenizer, Trainer

    assert BertConfig is transformers.BertConfig and Trainer is transformers.Trainer
    assert BertTokenizer is transformers.BertTokenizer
    assert AutoTokenizer is transformers.AutoTokenizer


@pytest.mark.parametrize("name", ["DebertaModel", "DebertaForMaskedLM", "pipeline"])
def test_another_model_is_not_imported_in_silence(name):
    with pytest.raises(ImportError, match=rf"fastbert has no {name}: .*fastbert\.accelerate"):
        exec(f"from fastbert import {name}")
    with pytest.raises(ImportError, match="cannot import name 'Nonsense'"):
        exec("from fastbert import Nonsense")
    assert not hasattr(fastbert, "nonsense")


def test_auto_classes_give_ours_where_there_are_some(tmp_path, caplog):
    from fastbert import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

    config = transformers.RobertaConfig(**SIZES)
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path / "ours")
    for auto, name in (
        (AutoModel, "RobertaModel"),
        (AutoModelForSequenceClassification, "RobertaForSequenceClassification"),
        (AutoModelForMaskedLM, "RobertaForMaskedLM"),
    ):
        model = auto.from_pretrained(tmp_path / "ours", padding="keep")
        assert type(model) is getattr(fastbert, name) and model.padding == "keep"
        assert type(auto.from_config(config)) is type(model)
    assert type(transformers.AutoModel.from_pretrained(tmp_path / "ours")) is (
        transformers.RobertaModel
    )
    assert not [r for r in caplog.records if r.name == "fastbert"]
    other = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99)
    transformers.GPT2Model(other).save_pretrained(tmp_path / "theirs")
    assert type(AutoModel.from_pretrained(tmp_path / "theirs")) is transformers.GPT2Model
    (record,) = [r for r in caplog.records if r.name == "fastbert"]
    assert record.getMessage().endswith("AutoModel gives transformers' own class for type 'gpt2'")
    with pytest.raises(ValueError, match="expected no frozen for a model of type 'gpt2'"):
        AutoModel.from_pretrained(tmp_path / "theirs", frozen=True)
    with pytest.raises(OSError, match="from_pretrained"):
        AutoModel(config)
