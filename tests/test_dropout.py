"""Dropout inside kernels: the masks themselves, and every op that applies one."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastbert
from fastbert import ops
from fastbert.ops.reference import attention_ref, attention_varlen_ref, layer_norm_ref
from fastbert.packing import PackedBatch
from fastbert.testing import assert_matches, with_gradients

masks = pytest.importorskip(
    "fastbert.kernels._dropout", reason="needs triton", exc_type=ImportError
)
PROBABILITIES = (0.01, 0.1, 0.5, 0.9)


@pytest.fixture(autouse=True)
def _kernels():
    with fastbert.backend("triton"):
        yield


def new_seed(device) -> torch.Tensor:
    return ops.dropout_seed(device)


def attention_mask(seed, p, lengths, heads, device, tile):
    """What the attention kernel keeps, [B, H, S, S]: its weights are uniform and v is one-hot."""
    from fastbert.kernels._tiles import AttentionTile
    from fastbert.kernels.attention import attention_varlen_fwd

    longest = max(lengths)
    total, width = sum(lengths), 128
    assert longest <= width
    q = torch.zeros(total, heads, width, device=device)
    v = torch.cat([torch.eye(n, width, device=device) for n in lengths])
    v = v[:, None].expand(-1, heads, -1).contiguous()
    sizes = torch.tensor(lengths, device=device)
    batch = PackedBatch.from_mask(torch.arange(longest, device=device) < sizes[:, None])
    m, n, single = tile
    chosen = AttentionTile(m, n, width, 4, 1, single)
    out, _ = attention_varlen_fwd(
        q, q, v, batch.cu_seqlens, batch.cu_seqlens,
        [(batch.classes(())[0].tile_map(m), chosen)], scale=1.0, dropout_p=p, seed=seed,
    )  # fmt: skip
    return batch.unpack(out).transpose(1, 2)[..., :longest] * sizes[:, None, None, None]


@pytest.mark.slow
@pytest.mark.parametrize("p", PROBABILITIES)
def test_kernel_and_replica_drop_the_same_for_every_tile(p, device):
    lengths, heads = [70, 1, 33], 2
    seed = new_seed(device)
    expected = masks.scores_kept(seed.item(), 3, heads, 70, 70, p)
    for i, n in enumerate(lengths):  # beyond a sequence there is nothing to keep
        expected[i, :, n:] = expected[i, :, :, n:] = 0.0
    for tile in ((16, 16, False), (16, 32, False), (64, 16, False), (32, 128, True)):
        actual = attention_mask(seed, p, lengths, heads, device, tile)
        torch.testing.assert_close(actual.cpu().double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("p", PROBABILITIES)
def test_share_of_what_stays_is_binomial(p):
    """Five standard deviations around the probability that the fields can express."""
    for kept in (
        masks.scores_kept(2**61 + 12345, 4, 12, 128, 128, p),
        masks.values_kept(-(2**60) - 99, 1024, 768, p),
    ):
        scale = kept.max().item()
        stays = 1 / scale
        assert stays == pytest.approx(1 - p, abs=0.02 * p)
        n = kept.numel()
        share = (kept > 0).double().mean().item()
        assert abs(share - stays) < 5 * math.sqrt(stays * (1 - stays) / n)
        assert set(kept.unique().tolist()) == {0.0, scale}


def test_bits_are_independent_of_each_other_and_of_their_place():
    """No correlation between neighbours, rows, heads, sequences or seeds beyond chance."""
    p = 0.5
    one = masks.scores_kept(7, 2, 4, 256, 256, p) - 1.0  # +-1
    values = masks.values_kept(7, 512, 1024, p) - 1.0
    pairs = {
        "next column": (one[..., :-1], one[..., 1:]),
        "next row": (one[..., :-1, :], one[..., 1:, :]),
        "columns 8 apart": (one[..., :-8], one[..., 8:]),
        "rows 8 apart": (one[..., :-8, :], one[..., 8:, :]),
        "transposed": (one, one.transpose(-1, -2)),
        "next head": (one[:, :-1], one[:, 1:]),
        "next sequence": (one[:-1], one[1:]),
        "next seed": (one, masks.scores_kept(8, 2, 4, 256, 256, p) - 1.0),
        "high half of the seed": (one, masks.scores_kept(7 + 2**32, 2, 4, 256, 256, p) - 1.0),
        "value, next": (values[:, :-1], values[:, 1:]),
        "value, next row": (values[:-1], values[1:]),
        "value, next seed": (values, masks.values_kept(8, 512, 1024, p) - 1.0),
    }
    for name, (a, b) in pairs.items():
        off = a if name != "transposed" else a.triu(1)
        n = int((off != 0).sum())
        assert abs((off * b).sum().item()) < 5 * math.sqrt(n), name
    # Rows and columns as wholes: their sums spread like those of coins.
    for sums in (one.sum(-1), one.sum(-2), values.sum(-1), values.sum(0)):
        length = 256 if sums.dim() > 1 else (1024 if sums.shape[0] == 512 else 512)
        assert 0.85 < sums.var().item() / length < 1.15


def test_corners_of_rectangles_and_rows_of_three_are_independent():
    """What a hash that is nearly linear in a position would show; 512 is 256 words."""
    one = masks.scores_kept(7, 8, 12, 640, 640, 0.5) - 1.0  # +-1
    for rows, columns in ((1, 1), (8, 8), (16, 16), (128, 128), (512, 512), (512, 16)):
        top, bottom = one[..., :-rows, :], one[..., rows:, :]
        corners = (top[..., :-columns] * top[..., columns:]
                   * bottom[..., :-columns] * bottom[..., columns:])  # fmt: skip
        assert abs(corners.sum().item()) < 5 * math.sqrt(corners.numel()), (rows, columns)
    for turned in (one, one.transpose(-1, -2)):
        for apart in (1, 8, 16, 256):
            three = turned[..., : -2 * apart] * turned[..., apart:-apart] * turned[..., 2 * apart :]
            assert abs(three.sum().item()) < 5 * math.sqrt(three.numel()), apart


def test_levels_of_a_probability():
    assert masks.dropout_levels(0.0, coarse=True) == (0, 0, 1.0)
    assert masks.dropout_levels(0.1, coarse=True)[:2] == (8, 26)  # 0.1016, with its own scale
    assert masks.dropout_levels(0.1, coarse=True)[2] == 256 / 230
    assert masks.dropout_levels(0.01, coarse=True)[0] == 16
    assert masks.dropout_levels(0.5, coarse=False) == (16, 32768, 2.0)
    for coarse in (False, True):
        assert masks.dropout_levels(1.0, coarse=coarse)[2] == 0.0
        assert masks.dropout_levels(1e-9, coarse=coarse)[1] == 1  # some are dropped, if few


def run_op(name, device, dtype=torch.float32):
    """An op with dropout: (p, seed) -> result, tensors; and the reference (tensors, p, seed)."""
    lengths, heads = [40, 1, 0, 23], 2
    if name == "layer_norm":
        x, residual = torch.randn(2, 37, 77).to(device, dtype)
        weight, bias, input_bias = torch.randn(3, 77).to(device, dtype)

        def run(tensors, p, seed):
            x, residual, input_bias, w, b = tensors
            return ops.layer_norm(
                x, w, b, eps=1e-5, residual=residual, input_bias=input_bias, dropout_p=p, seed=seed
            )

        def reference(tensors, p, seed):
            x, residual, input_bias, w, b = tensors
            kept = masks.values_kept(seed.item(), 37, 77, p).to(device)
            return layer_norm_ref(x, w, b, 1e-5, residual, input_bias, kept)

        return (x, residual, input_bias, weight, bias), run, reference
    if name in ("attention_varlen", "long attention_varlen"):
        if name.startswith("long"):
            lengths, heads = [140, 1, 0, 23], 1
        batch = PackedBatch.from_lengths(lengths, device)

        def reference(tensors, p, seed):
            longest = max(lengths)
            kept = masks.scores_kept(seed.item(), 4, heads, longest, longest, p).to(device)
            return attention_varlen_ref(*tensors, lengths, lengths, kept=kept, operands=dtype)

        return (
            torch.randn(3, sum(lengths), heads, 32).to(device, dtype).unbind(0),
            lambda t, p, seed: ops.attention_varlen(*t, batch, dropout_p=p, seed=seed),
            reference,
        )
    keep = torch.rand(2, 70, device=device) < 0.7

    def reference(tensors, p, seed):
        kept = masks.scores_kept(seed.item(), 2, 2, 40, 70, p).to(device)
        return attention_ref(*tensors[:3], keep, tensors[3], kept=kept, operands=dtype)

    return (
        (
            torch.randn(2, 2, 40, 32).to(device, dtype),
            *torch.randn(2, 2, 2, 70, 32).to(device, dtype),
            torch.randn(1, 2, 40, 70).to(device, dtype),
        ),
        lambda t, p, seed: ops.attention(*t[:3], key_mask=keep, bias=t[3], dropout_p=p, seed=seed),
        reference,
    )


NAMES = (
    "attention_varlen",
    pytest.param("long attention_varlen", marks=pytest.mark.slow),
    "attention",
    "layer_norm",
)


@pytest.mark.parametrize("lengths", [[5, 40], [140, 3]], ids=str)
def test_attention_without_a_weight_left_is_zeros_and_so_are_its_gradients(lengths, device):
    """The scale of what stays is 0 then, by which delta cannot be divided."""
    qkv = torch.randn(sum(lengths), 3, 2, 32, device=device, requires_grad=True)
    out = ops.attention_qkv(qkv, PackedBatch.from_lengths(lengths, device), dropout_p=1.0)
    (gradient,) = torch.autograd.grad(out, qkv, torch.randn_like(out))
    assert not out.any() and not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "p", [0.1, *(pytest.param(p, marks=pytest.mark.slow) for p in (0.01, 0.5))]
)
@pytest.mark.parametrize("name", NAMES)
def test_op_with_dropout_matches_fp64_with_the_same_mask(name, p, dtype, device):
    """Forward and backward: only the same mask in both gives these gradients."""
    tensors, run, reference = run_op(name, device, dtype)
    seed = new_seed(device)
    upstream = torch.randn(run(tensors, p, seed).shape).to(device, dtype)
    actual = with_gradients(lambda *tensors: run(tensors, p, seed))(upstream, *tensors)
    assert_matches(
        actual, with_gradients(lambda *tensors: reference(tensors, p, seed)),
        (upstream, *tensors), name, inside=None if name == "layer_norm" else torch.float32,
    )  # fmt: skip
    with torch.no_grad():
        assert torch.equal(run(tensors, p, seed), actual[0])


@pytest.mark.parametrize("name", NAMES)
def test_edges_of_the_probability(name, device):
    tensors, run, _ = run_op(name, device)
    seed = new_seed(device)
    assert torch.equal(run(tensors, 0.0, seed), run(tensors, 0.0, None))
    nothing = run(tensors, 1.0, seed)
    if name == "layer_norm":
        _, residual, _, weight, bias = tensors
        expected = ops.layer_norm(residual, weight, bias, eps=1e-5)
        torch.testing.assert_close(nothing, expected)
    else:
        assert not nothing.any()
    leaves = [t.detach().requires_grad_() for t in tensors]
    grads = torch.autograd.grad(run(leaves, 1.0, seed).sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0].any()
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1\.5"):
        run(tensors, 1.5, seed)
    with pytest.raises(ValueError, match="int64"):
        run(tensors, 0.5, seed.int())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_seeds_come_from_torchs_generator(name, device):
    tensors, run, _ = run_op(name, device)

    def drawn():
        return run(tensors, 0.3, None)

    torch.manual_seed(5)
    first, second = drawn(), drawn()
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(drawn(), first) and torch.equal(drawn(), second)
    generators = [torch.Generator(device).manual_seed(5) for _ in range(2)]
    mine, same = (
        run(tensors, 0.3, ops.dropout_seed(device, generator)) for generator in generators
    )
    assert torch.equal(mine, same)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_drops_the_same_twice(name, reentrant, device):
    tensors, run, _ = run_op(name, device)
    results = []
    for recompute in (False, True):
        torch.manual_seed(3)
        leaves = [t.detach().requires_grad_() for t in tensors]

        def forward(*leaves):
            return run(leaves, 0.3, None)

        if recompute:
            out = checkpoint(forward, *leaves, use_reentrant=reentrant)
        else:
            out = forward(*leaves)
        out.pow(2).sum().backward()
        results.append([out, *(t.grad for t in leaves)])
    assert all(map(torch.equal, *results))


def test_seeds_of_a_layer_are_as_good_as_single_ones(device):
    from fastbert.ops.dropout import dropout_seeds

    torch.manual_seed(5)
    seeds = dropout_seeds(device, 3)
    torch.manual_seed(5)
    assert all(map(torch.equal, seeds, dropout_seeds(device, 3)))
    assert len({int(seed) for seed in seeds}) == 3
    for seed in seeds:
        assert (seed.shape, seed.dtype) == ((1,), torch.int64) and seed.is_contiguous()
        assert seed.data_ptr() % 16 == 0, "kernels would be compiled once more"


def test_no_two_places_of_a_model_drop_by_one_seed(device, monkeypatch):
    from fastbert.kernels import _launch, attention, layernorm
    from tiny import inputs_for, tiny_config

    seeds = []
    make_again = _launch.Again.__call__

    def again(self, *tensors):
        for slot in self._slots:
            if (tensor := tensors[slot.tensor]).dtype == torch.int64:
                seeds.append(tensor.flatten()[slot.offset // 8].item())
        make_again(self, *tensors)

    monkeypatch.setattr(_launch.Again, "__call__", again)
    for module in (attention, layernorm):  # in forward alone: backward has them again
        launch = module.launch
        monkeypatch.setattr(
            module, "launch",
            lambda kernel, grid, *args, launch=launch, **constants: (
                seeds.extend(int(a) for a in args if getattr(a, "dtype", None) == torch.int64),
                launch(kernel, grid, *args, **constants),
            ),
        )  # fmt: skip
    model = fastbert.BertModel(tiny_config(num_hidden_layers=3)).to(device).train()
    model(**inputs_for("BertModel", None, device))
    assert len(seeds) == len(set(seeds)) == 3 * 3


def test_a_seed_is_for_kernels(device):
    tensors, run, _ = run_op("attention_varlen", device)
    with fastbert.backend("torch"), pytest.raises(NotImplementedError, match=r"torch\.manual_seed"):
        run(tensors, 0.1, new_seed(device))


def test_dropout_under_a_compiler(device):
    """The seed is drawn inside the graph: every call another mask, the same as eager's kernels."""
    tensors, run, _ = run_op("layer_norm", device)
    torch._dynamo.reset()
    seed = new_seed(device)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tensors, 0.3, seed), run(tensors, 0.3, seed))
    assert not torch.equal(compiled(tensors, 0.3, None), compiled(tensors, 0.3, None))
