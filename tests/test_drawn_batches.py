"""The batches of a pre-training run: one stream, whoever asks from where; the losses they give."""

import functools

import numpy as np
import pytest
import torch
import transformers
from tiny import tiny_config

import fastbert
from fastbert.training import Corpus, Masking, PackedCollator, SegmentDataset, draw
from fastbert.training.masked_lm import DrawnBatches

pytestmark = pytest.mark.usefixtures("on_torch")


def parts(texts, text_cache, tiny_folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    corpus = Corpus.prepare([texts], tokenizer, cache_dir=text_cache)
    drawer = functools.partial(
        lambda epoch: draw(corpus, np.arange(corpus.num_documents), max_length=40, epoch=epoch)
    )
    return drawer, SegmentDataset(corpus, tokenizer, pairs=True), Masking(tokenizer)


def test_batches_of_a_run(texts, text_cache, tiny_folder):
    drawer, _, _ = parts(texts, text_cache, tiny_folder)
    batches = DrawnBatches(drawer, 256, 200)
    drawn = list(batches)
    assert len(drawn) == 200 == len(batches) and len(batches.starts) > 2
    second, third = batches.starts[1:3]
    for epoch, (start, end) in enumerate(((0, second), (second, third))):
        keys = [key for batch in drawn[start:end] for key in batch]
        assert {key.epoch for key in keys} == {epoch}
        assert sorted(key.example for key in keys) == list(range(len(drawer(epoch))))
    shares = [list(DrawnBatches(drawer, 256, 50, rank=r, world_size=4)) for r in range(4)]
    assert [batch for step in zip(*shares, strict=True) for batch in step] == drawn
    for done in (0, 1, second, second + 3, 199, 200):
        resumed = DrawnBatches(drawer, 256, 200)
        resumed.done, resumed.starts = done, list(batches.starts)
        again = list(resumed)
        assert again[:done] == [[]] * done and again[done:] == drawn[done:]
        fresh = DrawnBatches(drawer, 256, 200)
        fresh.done = done
        assert list(fresh)[done:] == drawn[done:], "also where no epoch is known yet"


@pytest.mark.slow
def test_the_losses_of_transformers(texts, text_cache, tiny_folder):
    """50 steps with the same batches: packed here, padded there."""
    drawer, dataset, masking = parts(texts, text_cache, tiny_folder)
    config = tiny_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    theirs = transformers.BertForPreTraining(config)
    ours = fastbert.BertForPreTraining(config, skip_logits=True)
    ours.load_state_dict(theirs.state_dict())
    losses = []
    for model, collator in (
        (theirs, PackedCollator(padded=True, masking=masking)),
        (ours, PackedCollator(ours, masking=masking)),
    ):
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
        losses.append([])
        for keys in DrawnBatches(drawer, 256, 50):
            loss = model(**collator([dataset[key] for key in keys])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)
    assert losses[0][-1] < losses[0][0] - 0.5
