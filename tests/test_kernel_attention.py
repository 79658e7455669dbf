"""The attention kernels against their reference, through the ops that launch them."""

import math
import sys

import pytest
import torch
from tiny import DTYPES, one_is_quick

import fastbert
from fastbert import ops
from fastbert.ops.reference import attention_ref, attention_varlen_ref
from fastbert.packing import PackedBatch
from fastbert.testing import assert_matches

pytest.importorskip("triton")
# One token, primes, an empty sequence; keys in one tile, over a tile edge, in several tiles.
RAGGED = {
    "one token": [1],
    "short": [1, 7, 0, 31],
    "tile edge": [32, 33, 64, 1],
    "two tiles": [65, 3, 127],
    "walks": [131, 1, 200],
}


@pytest.fixture(autouse=True)
def _kernels():
    with fastbert.backend("triton"):
        yield


def projection(total: int, heads: int, head_dim: int, dtype, device):
    """q, k and v as the encoder has them: views of one [T, 3, H, D]."""
    return torch.randn(total, 3, heads, head_dim).to(device, dtype).unbind(1)


def check(actual, reference, tensors, *rest, name, **options):
    """The kernels compute in fp32 from operands of their dtype, and round once."""
    options["operands"] = tensors[0].dtype
    assert_matches(
        actual, lambda *tensors: reference(*tensors, *rest, **options), tensors, name,
        inside=torch.float32,
    )  # fmt: skip


def check_varlen(q, k, v, lengths, key_lengths=None, scale=None, bias=None):
    batch = PackedBatch.from_lengths(lengths, q.device)
    keys = None if key_lengths is None else PackedBatch.from_lengths(key_lengths, q.device)
    actual = ops.attention_varlen(q, k, v, batch, key_batch=keys, scale=scale, bias=bias)
    assert actual.is_contiguous()

    def reference(q, k, v, bias=None, **options):
        return attention_varlen_ref(q, k, v, lengths, key_lengths or lengths, scale, bias=bias,
                                    **options)  # fmt: skip

    tensors = (q, k, v) if bias is None else (q, k, v, bias)
    check(actual, reference, tensors, name=f"attention_varlen {lengths}")
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
def test_varlen_matches_reference(lengths, dtype, device):
    check_varlen(*projection(sum(lengths), 2, 64, dtype, device), lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 16, 32, 48, 80, 96, 128])
def test_varlen_matches_reference_for_every_head_size(head_dim, dtype, device):
    for lengths in ([5, 1, 30], [70, 130]):
        check_varlen(*projection(sum(lengths), 2, head_dim, dtype, device), lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", one_is_quick([64, 16, 80, 128]))
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
def test_varlen_with_a_bias_matches_reference(lengths, head_dim, dtype, device):
    bias = torch.randn(2, *[max(lengths)] * 2).to(device, dtype)
    bias[:, 1:, 0] = -torch.inf
    by_column = bias.transpose(1, 2).contiguous().transpose(1, 2)
    for given in (bias, by_column) if head_dim == 64 else (bias,):
        q, k, v = projection(sum(lengths), 2, head_dim, dtype, device)
        check_varlen(q, k, v, lengths, bias=given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_varlen_cross_lengths_and_no_keys(dtype, device):
    q = torch.randn(44, 2, 32).to(device, dtype)
    k, v = torch.randn(2, 140, 2, 32).to(device, dtype)
    actual = check_varlen(q, k, v, [3, 40, 0, 1], [130, 7, 3, 0])
    assert not actual[43:].any()  # the last query's sequence has no keys


def test_scale_is_honoured(device):
    for scale in (0.0, 0.05, 2.0):
        check_varlen(*projection(40, 2, 32, torch.float32, device), [33, 7], scale=scale)


def test_large_scores_stay_finite(device):
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = projection(150, 2, 32, dtype, device)
        check_varlen(q * 30, k * 30, v, [130, 20])


def test_a_sequence_does_not_depend_on_its_place_in_a_batch_bit_for_bit(device):
    lengths = [17, 130, 1, 64]
    q, k, v = projection(sum(lengths), 2, 32, torch.float16, device)
    batch = PackedBatch.from_lengths(lengths, device)
    together = ops.attention_varlen(q, k, v, batch).split(lengths)
    order = [2, 0, 3, 1]
    rows = torch.cat([torch.arange(sum(lengths), device=device).split(lengths)[i] for i in order])
    shuffled = [lengths[i] for i in order]
    moved = ops.attention_varlen(
        q[rows], k[rows], v[rows], PackedBatch.from_lengths(shuffled, device)
    ).split(shuffled)
    for at, i in enumerate(order):
        assert torch.equal(moved[at], together[i])
    again = ops.attention_varlen(q, k, v, batch).split(lengths)
    assert all(map(torch.equal, together, again))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", one_is_quick([64, 32, 128]))
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_sequence_alone_is_the_same_bit_for_bit(has_bias, head_dim, dtype, device):
    """Neighbours of every class of lengths: what runs for one follows from its own length."""
    lengths = [1, 130, 16, 0, 32, 33, 64, 65, 200, 128]
    q, k, v = projection(sum(lengths), 2, head_dim, dtype, device)
    bias = torch.randn(2, 200, 200).to(device, dtype) if has_bias else None
    together = ops.attention_varlen(
        q, k, v, PackedBatch.from_lengths(lengths, device), bias=bias
    ).split(lengths)
    parts = zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
    for n, part, out in zip(lengths, parts, together, strict=True):
        batch = PackedBatch.dense(1, n, device)
        places = bias[:, :n, :n] if has_bias else None
        assert torch.equal(ops.attention_varlen(*part, batch, bias=places), out), n


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_of_other_keys_alone_are_the_same_bit_for_bit(dtype, device):
    lengths, key_lengths = [1, 70, 3, 0, 20], [130, 7, 0, 9, 70]
    q = torch.randn(sum(lengths), 2, 32).to(device, dtype)
    k, v = torch.randn(2, sum(key_lengths), 2, 32).to(device, dtype)
    batch, keys = (PackedBatch.from_lengths(n, device) for n in (lengths, key_lengths))
    together = ops.attention_varlen(q, k, v, batch, key_batch=keys).split(lengths)
    parts = zip(q.split(lengths), k.split(key_lengths), v.split(key_lengths), strict=True)
    for i, part in enumerate(parts):
        batch, keys = (PackedBatch.from_lengths([n[i]], device) for n in (lengths, key_lengths))
        assert torch.equal(ops.attention_varlen(*part, batch, key_batch=keys), together[i])


def test_one_tile_and_walking_agree_and_log_sum_exp_is_right(device):
    """The same rows through every tile: results within the budget, statistics too."""
    from fastbert.kernels._tiles import AttentionTile
    from fastbert.kernels.attention import attention_varlen_fwd

    lengths = [30, 1, 17]
    q, k, v = projection(48, 2, 32, torch.float32, device)
    batch = PackedBatch.from_lengths(lengths, device)
    (everything,) = batch.classes(())

    def specification(q, k, v):
        sums = [
            torch.logsumexp(torch.einsum("qhd,khd->hqk", *rows) * 32**-0.5, -1) / math.log(2)
            for rows in zip(q.split(lengths), k.split(lengths), strict=True)
        ]
        return attention_varlen_ref(q, k, v, lengths, lengths), torch.cat(sums, -1)

    for single, block_m, block_n in ((True, 32, 32), (False, 32, 32), (False, 16, 16)):
        tile = AttentionTile(block_m, block_n, 32, 4, 1, single)
        results = attention_varlen_fwd(
            q, k, v, batch.cu_seqlens, batch.cu_seqlens, [(everything.tile_map(block_m), tile)],
            scale=32**-0.5, keep_lse=True,
        )  # fmt: skip
        assert_matches(results, specification, (q, k, v), str(tile))


def test_nothing_outside_the_given_rows_is_read(device):
    """q, k and v lie in a projection that is NaN around every head and every sequence."""
    for head_dim, lengths in ((48, [70, 3]), (64, [200, 17, 1])):
        total = sum(lengths)
        around = torch.full((total + 128, 3, 2, head_dim + 16), torch.nan, device=device)
        inside = around[64 : 64 + total, :, :, :head_dim]
        inside.copy_(torch.randn(inside.shape))
        check_varlen(*inside.unbind(1), lengths)
        dense = around[64 : 64 + total].view(1, total, 3, 2, head_dim + 16)[..., :head_dim]
        q, k, v = dense.permute(2, 0, 3, 1, 4)
        assert torch.equal(
            ops.attention(q, k, v), ops.attention(*(t.contiguous() for t in (q, k, v)))
        )


@pytest.mark.parametrize("single", [True, False])
def test_rows_far_apart_are_found(single, device):
    """Offsets over 2**31 values within one sequence; of the memory only the rows are touched."""
    from fastbert.kernels._tiles import AttentionTile
    from fastbert.kernels.attention import attention_varlen_fwd

    apart, keys = 2**26, 33
    memory = torch.empty(keys * apart, dtype=torch.float16, device=device)
    k, v = (memory.as_strided((keys, 1, 16), (apart, 16, 1), at) for at in (0, 64))
    for t in (k, v):
        t.copy_(torch.randn(t.shape))
    q = torch.randn(3, 1, 16).to(device, torch.float16)
    one, other = (PackedBatch.from_lengths([n], device) for n in (3, keys))
    tile = AttentionTile(16, 64 if single else 32, 16, 4, 1, single)
    tiles = one.classes(())[0].tile_map(16)
    out, _ = attention_varlen_fwd(
        q, k, v, one.cu_seqlens, other.cu_seqlens, [(tiles, tile)], scale=0.25
    )
    near = [t.contiguous() for t in (q, k, v)]
    check(out, attention_varlen_ref, near, [3], [keys], name="far apart")


@pytest.mark.parametrize("strides", [(2**26, 1), (64, 2**26)], ids=["queries", "keys"])
def test_a_bias_whose_rows_or_keys_lie_far_apart_is_found(strides, device):
    """Offsets over 2**31 values within one sequence; forward and gradients as of a copy."""
    memory = torch.empty(33 * 2**26, dtype=torch.float16, device=device)
    far = memory.as_strided((1, 33, 33), (0, *strides))
    far.copy_(torch.randn(far.shape))
    qkv = torch.randn(33, 3, 1, 16).to(device, torch.float16)
    do = torch.randn(33, 1, 16).to(device, torch.float16)
    batch = PackedBatch.from_lengths([33], device)
    results = []
    for bias in (far, far.contiguous()):
        inputs = [t.detach().requires_grad_() for t in (qkv, bias)]
        out = ops.attention_qkv(inputs[0], batch, bias=inputs[1])
        results.append([out, *torch.autograd.grad(out, inputs, do)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_what_follows_from_mask_and_bias_is_shared_and_never_stale(device):
    """By calls with the same tensors, until somebody changes one."""
    q, k, v = torch.randn(3, 2, 2, 9, 16).to(device)
    mask = key_mask(2, 9, device)
    biases = [torch.randn(2, 2, 9, 9).to(device) for _ in range(2)]
    shared = {}

    def agree(bias) -> object:
        given = dict(key_mask=mask, bias=bias)
        found = ops.attention(q, k, v, **given, shared=shared)
        assert torch.equal(found, ops.attention(q, k, v, **given))
        return shared["leveled"]

    first = agree(biases[0])
    assert agree(biases[0]) is first
    assert agree(biases[1]) is not first
    biases[1][:, :, 3] = -torch.inf
    mask[0, 0] = ~mask[0, 0]
    agree(biases[1])
    with torch.inference_mode():
        agree(torch.zeros_like(biases[0]))


def test_a_bias_is_copied_once_for_forward_and_backward():
    leveled, _ = sys.modules["fastbert.ops.attention"]._leveled(
        torch.randn(2, 2, 9, 9).transpose(2, 3), None
    )
    assert leveled.stride(-1) == 1


PADDED = {  # (B, H, Sq, Sk, D)
    "self": (2, 2, 33, 33, 32),
    "walks": (2, 2, 20, 150, 64),
    "one query": (2, 3, 1, 70, 16),
    "one key": (1, 2, 5, 1, 80),
}


def key_mask(batch_size: int, keys: int, device) -> torch.Tensor:
    """Holes in the middle; the last sequence has no key at all."""
    mask = torch.rand(batch_size, keys) < 0.6
    mask[-1] = False
    return mask.to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PADDED.values(), ids=PADDED)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias_shape", [None, "full", "per head", "per key", "per query"])
def test_padded_matches_reference(shape, dtype, masked, bias_shape, device):
    b, h, sq, sk, d = shape
    q = torch.randn(b, sq, h, d).to(device, dtype).transpose(1, 2)
    k, v = torch.randn(b, sk, 2, h, d).to(device, dtype).permute(2, 0, 3, 1, 4)
    mask = key_mask(b, sk, device) if masked else None
    bias = None
    if bias_shape is not None:
        dims = {
            "full": (b, h, sq, sk),
            "per head": (1, h, sq, sk),
            "per key": (b, 1, 1, sk),
            "per query": (1, 1, sq, 1),
        }[bias_shape]
        bias = torch.randn(dims).to(device, dtype)
        bias[..., 0, 0] = -torch.inf
    actual = ops.attention(q, k, v, key_mask=mask, bias=bias)
    assert actual.transpose(1, 2).is_contiguous()
    assert_matches(
        actual,
        lambda q, k, v, bias: attention_ref(q, k, v, mask, bias, operands=dtype),
        (q, k, v, bias),
        f"attention {shape}",
        inside=torch.float32,
    )
    if masked:
        assert not actual[-1].any()


def test_bool_bias_keeps_what_is_true(device):
    q, k, v = torch.randn(3, 2, 2, 9, 16).to(device)
    keep = torch.rand(2, 1, 9, 9).to(device) < 0.5
    as_floats = torch.zeros(2, 1, 9, 9, device=device).masked_fill(~keep, -torch.inf)
    assert torch.equal(ops.attention(q, k, v, bias=keep), ops.attention(q, k, v, bias=as_floats))


@pytest.mark.slow
def test_packed_equals_padded_at_the_size_of_bert(device):
    """bf16, twelve heads of 64, several tiles of queries and of keys."""
    lengths = [300, 129, 177]  # packed shorter ones have tiles of their own
    q, k, v = projection(sum(lengths), 12, 64, torch.bfloat16, device)
    mask = torch.arange(300, device=device) < torch.tensor(lengths, device=device)[:, None]
    batch = PackedBatch.from_mask(mask)
    heads_first = [batch.unpack(t).transpose(1, 2) for t in (q, k, v)]
    padded = ops.attention(*heads_first, key_mask=mask).transpose(1, 2)
    # the two differ in nothing but how they find a row
    assert torch.equal(check_varlen(q, k, v, lengths), batch.pack(padded))


def test_rows_of_queries_and_results_are_found_beyond_31_bits(device):
    """Only the last sequence is computed: the others are memory that nobody touches."""
    from fastbert.kernels._tiles import AttentionTile
    from fastbert.kernels.attention import attention_varlen_fwd

    total, rows = 2**31 // 128 + 100, 40
    memory = torch.empty(total, 1, 128, dtype=torch.float16, device=device)
    memory[-rows:] = torch.randn(rows, 1, 128)
    q = k = v = memory
    batch = PackedBatch.from_lengths([total - rows, rows], device)
    tile = AttentionTile(64, 64, 128, 8, 1, single=True)
    last = torch.tensor([[1, 0]], dtype=torch.int32, device=device)
    out, lse = attention_varlen_fwd(
        q, k, v, batch.cu_seqlens, batch.cu_seqlens, [(last, tile)], scale=0.1, keep_lse=True
    )
    near = [t[-rows:].clone() for t in (q, k, v)]
    check(out[-rows:], attention_varlen_ref, near, [rows], [rows], 0.1, name="last rows")
    assert lse[0, -rows:].isfinite().all()


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.3])
def test_attention_takes_any_scale(scale, device):
    q, k, v = torch.randn(3, 2, 2, 40, 32, device=device)
    actual = ops.attention(q, k, v, scale=scale)
    check(actual, attention_ref, (q, k, v), None, None, scale, name=f"scale {scale}")
    rows = [t[0].transpose(0, 1).contiguous() for t in (q, k, v)]
    packed = ops.attention_varlen(*rows, PackedBatch.from_lengths([40], device=device), scale=scale)
    check(packed, attention_varlen_ref, rows, [40], [40], scale, name=f"packed, scale {scale}")


@pytest.mark.parametrize("on", ["torch", "triton"])
def test_a_bias_by_place_is_added_in_every_sequence(on, device, monkeypatch):
    """Also its gradient, which is the sum over all sequences. Nothing is padded for it."""
    monkeypatch.setattr(sys.modules["fastbert.ops.attention"], "attention_padded", None)
    lengths = [5, 1, 0, 12, 12]
    batch = PackedBatch.from_lengths(lengths, device)
    q, k, v = (t.clone() for t in projection(sum(lengths), 2, 16, torch.float32, device))
    bias, do = torch.randn(2, 12, 12, device=device), torch.randn_like(q)

    def reference(q, k, v, bias):
        parts, scale = [], 16**-0.5
        for q_i, k_i, v_i in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):
            n = len(q_i)
            scores = torch.einsum("qhd,khd->hqk", q_i, k_i) * scale + bias[:, :n, :n]
            parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_i))
        return torch.cat(parts)

    def with_gradients(attend):
        def run(*tensors):
            leaves = [t.detach().requires_grad_() for t in tensors]
            with torch.enable_grad():
                out = attend(*leaves)
                return [out, *torch.autograd.grad((out * do.to(out.dtype)).sum(), leaves)]

        return run

    with fastbert.backend(on):
        attend = with_gradients(
            lambda q, k, v, b: ops.attention_varlen(q, k, v, batch, bias=b.expand(2, -1, -1))
        )
        actual = [t.detach() for t in attend(q, k, v, bias)]
        with pytest.raises(ValueError, match=r"a bias \(2, 12, 12\) and no key_batch, got \(2, 5"):
            ops.attention_varlen(q, k, v, batch, bias=bias[:, :5, :5])
        shared, alike = bias[:1].clone(), bias[:1].repeat(2, 1, 1)  # one for all heads
        *_, one = attend(q, k, v, shared)
        *_, each = attend(q, k, v, alike)
    torch.testing.assert_close(one, each.sum(0, keepdim=True))
    assert_matches(
        actual, lambda *t: [x.detach() for x in with_gradients(reference)(*t)], (q, k, v, bias),
        "bias", inside=torch.float32,
    )  # fmt: skip
