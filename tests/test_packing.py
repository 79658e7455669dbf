"""Packing and unpacking: every mask, every edge, and what it costs in synchronisations."""

import pytest
import torch

from fastbert import packing
from fastbert.packing import PackedBatch, PaddedBatch, pack, unpack

# name -> mask. Right and left padding, holes, full and empty rows, one token.
MASKS = {
    "right": [[1, 1, 1], [1, 0, 0], [1, 1, 0]],
    "left": [[1, 1, 1], [0, 0, 1], [0, 1, 1]],
    "holes": [[1, 0, 1], [0, 1, 0], [1, 1, 1]],
    "full": [[1, 1, 1], [1, 1, 1]],
    "one row empty": [[1, 1, 0], [0, 0, 0], [0, 1, 1]],
    "all empty": [[0, 0, 0], [0, 0, 0]],
    "one token": [[1]],
}


@pytest.fixture(params=["Python counts", "torch counts"])
def counting(request, monkeypatch):
    """Masks of few numbers on a CPU and all others are counted in two ways."""
    if request.param == "torch counts":
        monkeypatch.setattr(packing, "_FEW", 0)


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.float32])
@pytest.mark.parametrize("name", MASKS)
def test_pack_keeps_real_tokens_in_order_and_unpack_puts_them_back(name, dtype):
    mask = torch.tensor(MASKS[name]).to(dtype)
    x = torch.arange(1, 2 * mask.numel() + 1).view(*mask.shape, 2)
    rows, batch = pack(x, mask)
    assert torch.equal(rows, x[mask.bool()])
    assert batch.lengths == tuple(mask.bool().sum(1).tolist())
    assert batch.cu_seqlens.tolist() == [0, *mask.bool().sum(1).cumsum(0).tolist()]
    assert torch.equal(unpack(rows, batch), x * mask.bool()[..., None])
    assert torch.equal(unpack(rows, batch, fill=-7)[~mask.bool()], x[~mask.bool()] * 0 - 7)


def test_no_mask_and_a_mask_of_ones_are_views():
    x = torch.randn(2, 3, 4)
    for mask in (None, torch.ones(2, 3)):
        rows, batch = pack(x, mask)
        assert batch.indices is None
        assert rows.data_ptr() == x.data_ptr()
        assert unpack(rows, batch).data_ptr() == x.data_ptr()


def test_columns_are_the_padded_positions():
    mask = torch.tensor(MASKS["holes"])
    _, batch = pack(mask, mask)
    assert batch.columns().tolist() == [0, 2, 1, 0, 1, 2]
    assert PackedBatch.dense(2, 3, "cpu").columns().tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.usefixtures("counting")
def test_whatever_is_not_zero_is_a_token():
    mask = torch.tensor([[-0.0, float("nan"), -1.0, 0.5], [0.0, 0.0, 0.0, 1e-30]])
    batch = PackedBatch.from_mask(mask)
    assert batch.lengths == (3, 1) and batch.indices.tolist() == [1, 2, 3, 7]


@pytest.mark.usefixtures("counting")
def test_first_rows_are_cls_and_zeros_for_an_empty_sequence():
    mask = torch.tensor(MASKS["one row empty"])
    rows, batch = pack(torch.arange(1.0, 10.0).view(3, 3), mask)
    assert batch.first_rows(rows).tolist() == [1.0, 0.0, 8.0]
    assert not batch.starts_real
    assert PackedBatch.from_mask(torch.tensor(MASKS["right"])).starts_real


@pytest.mark.parametrize("block", [1, 2, 64])
def test_tile_map_covers_every_row_once_longest_first(block):
    batch = PackedBatch.from_lengths([5, 0, 1, 130])
    (everything,) = batch.classes(())
    tiles = everything.tile_map(block).tolist()
    covered = [
        (sequence, row)
        for sequence, tile in tiles
        for row in range(tile * block, min((tile + 1) * block, batch.lengths[sequence]))
    ]
    assert sorted(covered) == [(s, r) for s, n in enumerate(batch.lengths) for r in range(n)]
    order = list(dict.fromkeys(sequence for sequence, _ in tiles))
    assert order == [3, 0, 2]
    # built once, shared by all layers
    assert batch.classes(())[0].tile_map(block) is everything.tile_map(block)


def test_every_sequence_is_in_the_class_of_its_lengths_and_has_its_tiles_there():
    batch = PackedBatch.from_lengths([5, 0, 1, 130, 64, 65, 3])
    keys = PackedBatch.from_lengths([70, 9, 0, 2, 64, 1, 0])
    bounds = ((64, 64), (128, 128))
    found = {c.sequences: (c.max_seqlen_q, c.max_seqlen_k) for c in batch.classes(bounds)}
    assert found == {(3,): (130, 130), (5,): (65, 65), (0, 2, 4, 6): (64, 64)}
    found = {c.sequences: (c.max_seqlen_q, c.max_seqlen_k) for c in batch.classes(bounds, keys)}
    assert found == {(3,): (130, 2), (0, 5): (65, 70), (1, 2, 4, 6): (64, 64)}
    *_, short = batch.classes(bounds, keys)
    assert short.tile_map(64).tolist() == [[4, 0], [6, 0], [2, 0]]
    assert short.tile_map(32, of_keys=True).tolist() == [[4, 0], [4, 1], [1, 0]]
    assert sorted(short.tile_map(None).tolist()) == [[1, 0], [2, 0], [4, 0], [6, 0]]
    # the same sequences are the same class, whatever the bounds, and share their tiles
    assert batch.classes(((9999, 64), (9999, 128)))[0] is batch.classes(bounds)[0]
    assert batch.classes(bounds, keys) is batch.classes(bounds, keys)
    assert PackedBatch.from_lengths([0, 0]).classes(bounds) == ()


@pytest.mark.parametrize("block", [16, 2, None])
def test_a_capture_takes_the_tiles_of_equal_sequences_and_refuses_others(block, monkeypatch):
    """Also where the tiles are as many: they would be fixed at lengths that only the host knows."""
    (expected,) = PackedBatch.dense(3, 4, "cpu").classes(())
    (equal,) = PackedBatch.dense(3, 4, "cpu").classes(())
    (others,) = PackedBatch.from_lengths([3, 4]).classes(())
    expected = expected.tile_map(block)
    monkeypatch.setattr(packing, "capturing", lambda device: True)
    assert torch.equal(equal.tile_map(block), expected)
    with pytest.raises(RuntimeError, match="inside a CUDA graph capture"):
        others.tile_map(block)


def test_runs_join_equal_neighbours():
    batch = PackedBatch.from_lengths([3, 3, 0, 2, 3])
    assert batch.runs() == [(2, 3), (1, 2), (1, 3)]


def test_from_mask_reads_the_host_once(monkeypatch):
    """``tolist`` waits for a device once; ``nonzero`` and ``item`` would wait too."""
    monkeypatch.setattr(packing, "_FEW", 0)  # as on a GPU
    calls = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (calls.append("tolist"), original(t))[1])
    for name in ("item", "nonzero", "cpu", "__bool__", "__int__"):
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, name=name: pytest.fail(f"{name} synchronises")
        )
    batch = PackedBatch.from_mask(torch.tensor(MASKS["holes"]))
    batch.classes(())[0].tile_map(2)
    batch.columns()
    PackedBatch.dense(2, 3, "cpu")
    assert calls == ["tolist"]


def test_unpack_is_differentiable():
    mask = torch.tensor(MASKS["right"])
    x = torch.randn(3, 3, 2, requires_grad=True)
    rows, batch = pack(x, mask)
    unpack(rows, batch).pow(2).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach() * mask[..., None])


def test_padded_batch_fills_only_padding():
    mask = torch.tensor(MASKS["right"]).bool()
    batch = PaddedBatch((3, 3), key_mask=mask)
    x = torch.randn(3, 3, 2)
    rows = batch.pack(x)
    assert torch.equal(batch.view(rows), x)
    assert torch.equal(batch.unpack(rows), x * mask[..., None])
    assert batch.columns(x.device).tolist() == [0, 1, 2] * 3


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"expected a mask \(2, 3\)"):
        pack(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"expected \[batch, length"):
        pack(torch.zeros(3))
    with pytest.raises(ValueError, match="PaddedBatch"):
        PackedBatch.from_mask(torch.zeros(1, 1, 3, 3))
    with pytest.raises(ValueError, match="lengths >= 0"):
        PackedBatch.from_lengths([3, -1])
    rows, batch = pack(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="expected 6 rows"):
        unpack(rows[:5], batch)
