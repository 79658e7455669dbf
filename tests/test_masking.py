"""Masked inputs: the right shares of the right tokens, and the same ones whatever the batch."""

import math

import numpy as np
import pytest
import transformers
from scipy import stats

from fastbert.training import Masking
from fastbert.training.masking import IGNORED

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    words = [f"w{i}" for i in range(50)] + [f"##p{i}" for i in range(25)]
    path.write_text("\n".join(SPECIAL + words))
    return transformers.BertTokenizer(vocab=str(path))


def batch(lengths, seed=0):
    """[CLS], ordinary tokens, [SEP], one example behind the other."""
    random = np.random.default_rng(seed)
    rows = [[2, *random.integers(5, 80, n - 2), 3] for n in lengths]
    return np.concatenate(rows), np.array(lengths)


def certain(successes, of, share):
    """Whether a count is what a share of independent draws gives all but once in a million."""
    return stats.binomtest(int(successes), int(of), share).pvalue > 1e-6


def test_shares(tokenizer):
    ids, lengths = batch([128] * 800)
    examples = np.arange(800)
    hidden, labels = Masking(tokenizer)(ids, lengths, examples, epoch=0)
    chosen = labels != IGNORED
    per_example = chosen.reshape(800, 128).sum(1)
    assert (per_example == round(126 * 0.15)).all()
    assert (labels[chosen] == ids[chosen]).all() and (hidden[~chosen] == ids[~chosen]).all()
    assert not chosen[ids < 5].any() and not set(hidden[chosen]) & {0, 1, 2, 3}
    count, kept = chosen.sum(), 75  # ordinary tokens
    masked, same = (hidden[chosen] == 4).sum(), (hidden[chosen] == ids[chosen]).sum()
    assert certain(masked, count, 0.8)
    assert certain(same, count, 0.1 + 0.1 / kept)
    others = hidden[chosen & (hidden != 4) & (hidden != ids)]
    assert stats.chisquare(np.bincount(others, minlength=80)[5:]).pvalue > 1e-6
    at = chosen.reshape(800, 128)[:, 1:-1].sum(0)
    assert all(certain(n, 800, 19 / 126) for n in at), "some places are masked more often"


def test_what_is_masked_depends_on_seed_epoch_and_example_alone(tokenizer):
    ids, lengths = batch([20, 7, 33, 12])
    examples = np.array([5, 9, 2, 40])
    masking = Masking(tokenizer, seed=3)
    hidden, labels = masking(ids, lengths, examples, epoch=1)
    ends = np.cumsum(lengths)
    for order in ([2, 0, 3, 1], [1], [3, 2]):
        parts = [slice(ends[i] - lengths[i], ends[i]) for i in order]
        again = masking(
            np.concatenate([ids[p] for p in parts]), lengths[order], examples[order], epoch=1
        )
        for found, expected in zip(again, (hidden, labels), strict=True):
            assert (found == np.concatenate([expected[p] for p in parts])).all()
    for other in (
        masking(ids, lengths, examples, epoch=2),
        masking(ids, lengths, examples + 1, epoch=1),
        Masking(tokenizer, seed=4)(ids, lengths, examples, epoch=1),
    ):
        assert (other[1] != labels).any()
    by_example = masking(ids, lengths, examples, epoch=np.array([1, 1, 2, 1]))
    assert (by_example[1] == labels)[: ends[1]].all() and (by_example[1] != labels).any()


def test_neighbours_and_epochs_are_not_alike(tokenizer):
    """Examples, epochs and seeds are small numbers next to each other."""
    ids, lengths = batch([128] * 400)
    rows = [
        Masking(tokenizer, seed=seed)(ids, lengths, np.arange(400), epoch=epoch)[1] != IGNORED
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    flat = np.array(rows)[:, ids >= 5].reshape(3, 400, 126)
    for a, b in (
        (flat[0], flat[1]),
        (flat[0], flat[2]),
        (flat[1], flat[2]),
        (flat[0, 1:], flat[0, :-1]),
    ):
        both = (a & b).sum()
        expected = 19 * 19 / 126 * len(a)
        assert abs(both - expected) < 5 * math.sqrt(expected)


def test_probability(tokenizer):
    ids, lengths = batch([102] * 6 + [3])
    probability = np.array([0.15, 0.3, 0.5, 0.01, 0.0, 1.0, 0.15])
    chosen = Masking(tokenizer)(ids, lengths, np.arange(7), epoch=0, probability=probability)[1]
    counts = [(part != IGNORED).sum() for part in np.split(chosen, np.cumsum(lengths))]
    assert counts[:7] == [15, 30, 50, 1, 1, 100, 1], "at least one"


def test_nothing_to_mask(tokenizer):
    hidden, labels = Masking(tokenizer)(
        np.array([2, 3, 2, 7, 3]), np.array([2, 3]), [0, 1], epoch=0
    )
    assert (labels[[0, 1, 2, 4]] == IGNORED).all() and labels[3] == 7
    assert (hidden[[0, 1, 2, 4]] == [2, 3, 2, 3]).all()


def test_whole_words(tokenizer):
    ids, lengths = batch([128] * 400)
    continues = ids >= 55
    masking = Masking(tokenizer, whole_words=True)
    labels = masking(ids, lengths, np.arange(400), epoch=0)[1]
    chosen = labels != IGNORED
    # A piece goes with what stands before it, unless that is [CLS].
    follows = continues[1:] & (ids[:-1] >= 5)
    assert (chosen[1:] == chosen[:-1])[follows].all()
    assert not chosen[ids < 5].any()
    assert abs(chosen.sum() / (ids >= 5).sum() - 0.15) < 0.005
    single = Masking(tokenizer)(ids, lengths, np.arange(400), epoch=0)[1] != IGNORED
    assert not (single[1:] == single[:-1])[follows].all()


def test_what_cannot_be_masked(tokenizer, tmp_path):
    bare = transformers.BertTokenizer(vocab=str(_vocabulary(tmp_path, [*SPECIAL, "a", "b"])))
    with pytest.raises(ValueError, match=r"WordPiece vocabulary \(##ing\)"):
        Masking(bare, whole_words=True)
    bare.mask_token = None
    with pytest.raises(ValueError, match="tokenizer with a mask token"):
        Masking(bare)


def _vocabulary(folder, tokens):
    path = folder / "vocab.txt"
    path.write_text("\n".join(tokens))
    return path
