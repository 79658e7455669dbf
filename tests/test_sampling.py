"""Batches of so many tokens: what is in them follows from lengths, seed and epoch alone."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastbert.training import TokenBudgetSampler

LENGTHS = np.random.default_rng(0).integers(1, 129, 1000)


def sampler(lengths=LENGTHS, tokens=1024, **options) -> TokenBudgetSampler:
    return TokenBudgetSampler(lengths, tokens, **options)


def cost(batch, padded):
    lengths = LENGTHS[batch]
    return lengths.max() * len(batch) if padded else lengths.sum()


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
def test_every_example_once_in_full_batches(shuffle, padded):
    batches = list(sampler(shuffle=shuffle, padded=padded))
    assert len(batches) == len(sampler(shuffle=shuffle, padded=padded))
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    costs = np.array([cost(batch, padded) for batch in batches])
    assert costs.max() <= 1024
    assert costs.mean() > 0.93 * 1024
    if not shuffle and not padded:
        assert [i for batch in batches for i in batch] == list(range(1000))


def test_padded_batches_hold_similar_lengths():
    tokens = sum(cost(b, padded=True) for b in sampler(padded=True))
    at_random = sum(cost(b, padded=True) for b in np.array_split(np.arange(1000), 65))
    assert tokens < 1.05 * LENGTHS.sum() < 0.6 * at_random
    batches = list(sampler(padded=True))
    first = [LENGTHS[batch].max() for batch in batches[: len(batches) // 2]]
    assert min(first) < 40 and max(first) > 90, "batches go from short to long"


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_an_epoch_is_an_order_of_its_own_and_always_the_same(padded):
    of = [list(sampler(epoch=e, padded=padded)) for e in (0, 1, 0)]
    assert of[0] == of[2] != of[1]
    assert list(sampler(seed=1, padded=padded)) != of[0]
    again = sampler(padded=padded)
    assert [list(again), list(again)] == [of[0], of[0]], "until somebody says that it is over"
    again.set_epoch(1)
    assert list(again) == of[1]


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_processes_share_what_one_would_do(world_size, padded):
    shares = [
        list(sampler(rank=r, world_size=world_size, padded=padded)) for r in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    together = [batch for step in zip(*shares, strict=True) for batch in step]
    assert sorted(i for batch in together for i in batch) == list(range(1000))
    if not padded:  # but for the batches that had to be split
        alone = {tuple(batch) for batch in sampler()}
        assert len(alone - set(map(tuple, together))) < world_size


def test_it_goes_on_where_it_was():
    whole = list(sampler(epoch=3))
    resumed = sampler()
    resumed.resume(3, 7)
    resumed.set_epoch(3)  # as a Trainer says at the start of every epoch
    assert len(resumed) == len(whole) - 7
    assert list(resumed) == whole[7:]
    assert list(resumed) == whole, "the epoch after it is whole"


def test_in_a_data_loader():
    data = [{"n": int(n)} for n in LENGTHS]
    for workers in (0, 2):
        loader = DataLoader(
            data,
            batch_sampler=sampler(),
            num_workers=workers,
            collate_fn=lambda rows: torch.tensor([row["n"] for row in rows]),
        )
        found = [batch.tolist() for batch in loader]
        assert found == [LENGTHS[batch].tolist() for batch in sampler()]


def test_a_batch_may_be_one_example():
    assert sorted(map(tuple, sampler([8, 8, 8], 8))) == [(0,), (1,), (2,)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 8), "one example or more, got none"),
        (([[1, 2]], 8), r"got shape \(1, 2\)"),
        (([3, 9], 8), "1 to 8 tokens, got 9 in example 1"),
        (([3, 0], 8), "1 to 8 tokens, got 0 in example 1"),
    ],
)
def test_bad_lengths(arguments, message):
    with pytest.raises(ValueError, match=message):
        sampler(*arguments)


def test_too_many_processes():
    with pytest.raises(ValueError, match="rank from 0 to 1, got 2"):
        sampler(rank=2, world_size=2)
    with pytest.raises(ValueError, match="fewer processes"):
        list(sampler([8, 8, 8], 8, rank=0, world_size=2))
