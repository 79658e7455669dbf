"""BERTs that write by transformers' generate(): the encoder is packed, the decoder is theirs."""

import copy

import pytest
import torch
import transformers
from tiny import pair, tiny_config

import fastbert
from fastbert.families.obstacle import obstacle

pytestmark = pytest.mark.usefixtures("on_torch")
SOURCE = torch.randint(5, 99, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(9) < torch.tensor([9, 4, 6])[:, None]).long()


def models_of(family, **options):
    """An encoder, and a decoder that looks at it, of transformers."""
    writes = {"is_decoder": True, "add_cross_attention": True}
    if family == "bert":
        encoder = transformers.BertModel(tiny_config(**options))
        return encoder, transformers.BertLMHeadModel(tiny_config(**options, **writes))
    options = tiny_config().to_dict() | options
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "intermediate_size", "max_position_embeddings", "initializer_range",
             "hidden_dropout_prob", "attention_probs_dropout_prob")  # fmt: skip
    config = transformers.BertGenerationConfig(**{name: options[name] for name in names})
    theirs = copy.deepcopy(config)
    for name, value in writes.items():
        setattr(theirs, name, value)
    encoder = transformers.BertGenerationEncoder(config)
    return encoder, transformers.BertGenerationDecoder(theirs)


@pytest.fixture(params=["bert", "bert-generation"])
def both(request):
    """An encoder-decoder of transformers, and it accelerated."""
    torch.manual_seed(0)
    encoder, decoder = models_of(
        request.param, initializer_range=0.4, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    for config in (theirs.config, theirs.generation_config):
        config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 0, 3
    ours = copy.deepcopy(theirs)
    handle = fastbert.accelerate(ours)
    assert obstacle(ours.encoder) is None, "the encoder is packed"
    assert handle.notes == ["decoder.bert: decoder mode (config.is_decoder) is not packed"]
    return theirs, ours


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}])
def test_an_encoder_decoder_writes_the_same(both, options):
    found = []
    for model in both:
        torch.manual_seed(1)
        found.append(model.generate(SOURCE, attention_mask=MASK, max_new_tokens=12, **options))
    assert torch.equal(*found) and found[0].unique().numel() > 2


@pytest.mark.filterwarnings("ignore:Version v4.12.0:FutureWarning")
def test_an_encoder_decoder_learns_the_same(both):
    labels = torch.randint(5, 99, (3, 7))
    losses = [
        model.train()(input_ids=SOURCE, attention_mask=MASK, labels=labels).loss for model in both
    ]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    for theirs, ours in zip(*(model.parameters() for model in both), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_a_decoder_writes_the_same():
    theirs, ours = pair("BertLMHeadModel", is_decoder=True, eos_token_id=3, pad_token_id=0)
    start = SOURCE[:, :3]
    for options in ({}, {"num_beams": 2}):
        found = [model.generate(start, max_new_tokens=9, **options) for model in (theirs, ours)]
        assert torch.equal(*found)
