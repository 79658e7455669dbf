"""Embeddings that are trained on texts of any length: windows, and passes of so many tokens."""

import random

import numpy as np
import pytest
import sentence_transformers
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from fastbert.finetuning import embedding_model
from fastbert.finetuning.embedding_model import load_embedding_model
from fastbert.tasks.embed import Embedder
from fastbert.tasks.errors import LoadError
from fastbert.testing import assert_within_budget

pytestmark = [
    pytest.mark.usefixtures("on_torch"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

CPU = torch.device("cpu")
WINDOW, ROOM, STEP = 20, 18, 13  # tokens, words of a window, words from one to the next


def texts_of(count, longest, seed=0):
    draw = random.Random(seed)
    return [" ".join(f"word{draw.randrange(40)}" for _ in range(draw.randint(1, longest)))
            for _ in range(count)]  # fmt: skip


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def encoder_of(folder, pass_tokens, windows=True):
    return load_embedding_model(
        folder, CPU, max_length=WINDOW, windows=windows, pass_tokens=pass_tokens, frozen=False
    ).train()


def step(model, columns):
    """Vectors of a batch and the gradients that come of them, all in one row."""
    loss, made = MultipleNegativesRankingLoss(model), []
    model.zero_grad()
    hook = model.register_forward_hook(lambda _, __, out: made.append(out["sentence_embedding"]))
    loss([model.preprocess(texts) for texts in columns], None).backward()
    hook.remove()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(made).detach(), torch.cat(gradients)


class Reference(sentence_transformers.SentenceTransformer):
    """The same by words, a token each: every window for itself, then their mean."""

    def preprocess(self, inputs, prompt=None, **options):
        return {"texts": inputs}

    def forward(self, features):
        found = []
        for text in features["texts"]:
            words = text.split()
            starts = range(0, max(len(words) - ROOM, 0) + STEP, STEP)
            parts = [" ".join(words[start : start + ROOM]) for start in starts]
            windows = super().forward(super().preprocess(parts))
            found.append(windows["sentence_embedding"].mean(0))
        return {"sentence_embedding": torch.stack(found)}


@pytest.mark.parametrize("pass_tokens", [8192, 64])
def test_vectors_and_gradients_are_those_of_the_windows_mean(tiny_folder, pass_tokens):
    columns = [texts_of(6, 12, seed=1), texts_of(6, 90, seed=2)]
    ours, seen = without_dropout(encoder_of(tiny_folder, pass_tokens)), []
    ours[0].register_forward_pre_hook(lambda _, args: seen.append(tokens_of(*args)))
    found = step(ours, columns)
    assert max(seen) <= pass_tokens and (len(seen) == 2 if pass_tokens == 8192 else len(seen) > 8)
    theirs = without_dropout(Reference(str(tiny_folder), device="cpu")).train()
    theirs.max_seq_length = WINDOW
    plain, right = step(theirs, columns), step(theirs.double(), columns)
    for name, *results in zip(("vectors", "gradients"), found, right, plain, strict=True):
        assert_within_budget(*results, name)


def tokens_of(features):
    return int(features["attention_mask"].sum())


def test_dropout_is_the_same_when_a_pass_is_computed_again(tiny_folder, monkeypatch):
    columns = [texts_of(6, 12, seed=1), texts_of(6, 90, seed=2)]
    found = []
    for again in (True, False):
        if not again:
            monkeypatch.setattr(embedding_model, "checkpoint", lambda call, part, **_: call(part))
        model = encoder_of(tiny_folder, 64)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        torch.manual_seed(5)
        found.append(step(model, columns))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(found[0][0], step(model, columns)[0]), "dropout was on"


@pytest.mark.slow
def test_every_part_of_a_long_text_is_trained(tiny_folder):
    words = ["the"] * 20_000
    words[10_000], words[-1] = "rome", "paris"
    model = encoder_of(tiny_folder, 1024)
    vectors = model(model.preprocess([" ".join(words), "a word"]))["sentence_embedding"]
    vectors[0].square().sum().backward()
    gradient = model[0].model.embeddings.word_embeddings.weight.grad
    for word in ("rome", "paris"):
        assert gradient[model.tokenizer.convert_tokens_to_ids(word)].abs().max() > 0, word


def test_vectors_of_length_one_stay_so_and_embed_says_the_same(minilm_folder):
    texts = [" ".join(["The war was long."] * 40), "A word."]
    model = load_embedding_model(minilm_folder, CPU, max_length=64, windows=True)
    vectors = model.encode(texts)
    lengths = torch.tensor(np.tile(np.linalg.norm(vectors, axis=1), 16))
    assert_within_budget(lengths, torch.ones(32).double(), torch.ones(32), "lengths")
    same = Embedder(model, windows=True, max_length=64).embed(texts)
    torch.testing.assert_close(torch.tensor(vectors), torch.tensor(same))


def test_windows_need_room_beside_the_prompt(tiny_folder):
    encoder = encoder_of(tiny_folder, 64)
    with pytest.raises(LoadError, match=r"room for more than 5 tokens beside the prompt, got 4"):
        encoder.preprocess(["rome"], prompt="the " * 14)
