"""The gradients of the attention kernels against fp64, through the ops that launch them."""

import pytest
import torch
from tiny import DTYPES, one_is_quick

import fastbert
from fastbert import ops
from fastbert.ops.reference import attention_ref, attention_varlen_ref
from fastbert.packing import PackedBatch
from fastbert.testing import assert_matches, with_gradients

pytest.importorskip("triton")
# One token, no token, the edges of a tile; one program a sequence, then several tiles.
RAGGED = {
    "short": [1, 7, 0, 31],
    "tile edge": [32, 33, 64, 1],
    "walks": [131, 1, 65],
}


@pytest.fixture(autouse=True)
def _kernels():
    with fastbert.backend("triton"):
        yield


def check_gradients(function, reference, tensors, upstream, name):
    """Values and gradients; the kernels compute in fp32 from operands of their dtype."""
    _, *grads = actual = with_gradients(function)(upstream, *tensors)
    assert all(t.dtype == tensors[0].dtype for t in actual)
    assert_matches(
        actual, with_gradients(reference), (upstream, *tensors), name, inside=torch.float32
    )
    return grads


def check_varlen(dtype, device, head_dim, lengths, key_lengths=None, scale=None):
    heads = 2
    q = torch.randn(sum(lengths), heads, head_dim).to(device, dtype)
    k, v = torch.randn(2, sum(key_lengths or lengths), heads, head_dim).to(device, dtype)
    batch = PackedBatch.from_lengths(lengths, device)
    keys = None if key_lengths is None else PackedBatch.from_lengths(key_lengths, device)
    options = {"scale": scale, "operands": dtype}
    return check_gradients(
        lambda q, k, v: ops.attention_varlen(q, k, v, batch, key_batch=keys, scale=scale),
        lambda q, k, v: attention_varlen_ref(q, k, v, lengths, key_lengths or lengths, **options),
        (q, k, v),
        torch.randn(q.shape).to(device, dtype),
        f"attention_varlen {lengths} D{head_dim}",
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
def test_varlen_gradients_match_fp64(lengths, dtype, device):
    check_varlen(dtype, device, 64, lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
def test_varlen_gradients_of_a_bias_match_fp64(lengths, head_dim, dtype, device):
    """Its own is the sum over the sequences."""
    qkv = torch.randn(sum(lengths), 3, 2, head_dim).to(device, dtype)
    bias = torch.randn(2, *[max(lengths)] * 2).to(device, dtype)
    bias[:, 1:, 0] = -torch.inf
    batch = PackedBatch.from_lengths(lengths, device)
    check_gradients(
        lambda qkv, bias: ops.attention_qkv(qkv, batch, bias=bias),
        lambda qkv, bias: attention_varlen_ref(
            *qkv.unbind(1), lengths, lengths, operands=dtype, bias=bias
        ),
        (qkv, bias), torch.randn(len(qkv), 2, head_dim).to(device, dtype),
        f"attention_qkv {lengths} D{head_dim}, bias",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "head_dim", [8, 32, *(pytest.param(d, marks=pytest.mark.slow) for d in (16, 48, 80, 128))]
)
def test_varlen_gradients_for_every_head_size(head_dim, dtype, device):
    for lengths in ([5, 1, 30], [70, 130]):
        check_varlen(dtype, device, head_dim, lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_varlen_gradients_with_other_keys_and_no_keys(dtype, device):
    dq, dk, dv = check_varlen(dtype, device, 32, [3, 40, 0, 1], [130, 7, 3, 0])
    assert not dq[43:].any()  # no keys to attend to
    assert not dk[137:].any() and not dv[137:].any()  # no query looks at them


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_alone_passes_its_gradient_to_v(dtype, device):
    """Its weight is 1 whatever the score, so that q and k have none: zero but for rounding."""
    q, k, v = (torch.randn(3, 2, 64).to(device, dtype).requires_grad_() for _ in range(3))
    batch = PackedBatch.from_lengths([1, 1, 1], device)
    upstream = torch.randn(3, 2, 64).to(device, dtype)
    out = ops.attention_varlen(q, k, v, batch)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), upstream)
    torch.testing.assert_close(out, v)
    torch.testing.assert_close(dv, upstream)
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-5


def test_a_bias_per_query_has_no_gradient(device):
    """It moves all scores of a row alike: zero but for rounding, in the shape of the bias."""
    q, k, v = torch.randn(3, 2, 2, 9, 16, device=device)
    bias = torch.randn(1, 2, 9, 1, device=device, requires_grad=True)
    out = ops.attention(q, k, v, bias=bias)
    (dbias,) = torch.autograd.grad(out, bias, torch.randn_like(out))
    assert dbias.shape == bias.shape and dbias.abs().max() < 1e-5


def test_varlen_gradients_for_any_scale(device):
    for scale in (-0.3, 0.0, 0.05, 1.0):
        check_varlen(torch.float32, device, 32, [33, 7], scale=scale)


@pytest.mark.slow
def test_one_projection_gets_one_gradient(device):
    """`attention_qkv`: the same numbers as three tensors, in one gradient without a copy."""
    for lengths in ([5, 1, 0, 30], [131, 20]):
        qkv = torch.randn(sum(lengths), 3, 2, 32, device=device, requires_grad=True)
        batch = PackedBatch.from_lengths(lengths, device)
        upstream = torch.randn(sum(lengths), 2, 32, device=device)
        together = ops.attention_qkv(qkv, batch)
        (grad,) = torch.autograd.grad(together, qkv, upstream)
        apart = ops.attention_varlen(*qkv.unbind(1), batch)
        (expected,) = torch.autograd.grad(apart, qkv, upstream)
        assert torch.equal(together, apart) and torch.equal(grad, expected)


def test_upstream_gradients_of_any_strides(device):
    lengths = [40, 7]
    batch = PackedBatch.from_lengths(lengths, device)
    q, k, v = (torch.randn(47, 2, 32, device=device, requires_grad=True) for _ in range(3))
    out = ops.attention_varlen(q, k, v, batch)
    wide = torch.randn(2, 32, 47, device=device)
    for upstream in (wide.permute(2, 0, 1), torch.ones((), device=device).expand(47, 2, 32)):
        actual = torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True)
        expected = torch.autograd.grad(out, (q, k, v), upstream.contiguous(), retain_graph=True)
        assert all(map(torch.equal, actual, expected))


def test_gradients_do_not_depend_on_the_order_and_repeat_bit_for_bit(device):
    lengths = [17, 130, 1, 64]
    qkv = torch.randn(sum(lengths), 3, 2, 32).to(device, torch.bfloat16)
    upstream = torch.randn(sum(lengths), 2, 32).to(device, torch.bfloat16)

    def gradient(rows, lengths):
        part = qkv[rows].requires_grad_()
        out = ops.attention_qkv(part, PackedBatch.from_lengths(lengths, device))
        return torch.autograd.grad(out, part, upstream[rows])[0]

    parts = torch.arange(sum(lengths), device=device).split(lengths)
    together = gradient(torch.cat(parts), lengths).split(lengths)
    order = [2, 0, 3, 1]
    moved_lengths = [lengths[i] for i in order]
    moved = gradient(torch.cat([parts[i] for i in order]), moved_lengths).split(moved_lengths)
    again = gradient(torch.cat(parts), lengths).split(lengths)
    for at, i in enumerate(order):
        assert torch.equal(moved[at], together[i])
        assert torch.equal(again[i], together[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("others", [False, True], ids=["own keys", "other keys"])
@pytest.mark.parametrize("head_dim", one_is_quick([64, 16, 128]))
def test_gradients_of_a_sequence_alone_are_the_same_bit_for_bit(head_dim, others, dtype, device):
    """Neighbours of every class of lengths, and sequences without queries or keys."""
    lengths = [1, 130, 16, 0, 33, 64, 65, 128]
    key_lengths = [70, 5, 16, 9, 130, 0, 20, 128] if others else lengths
    q, do = torch.randn(2, sum(lengths), 2, head_dim).to(device, dtype)
    k, v = torch.randn(2, sum(key_lengths), 2, head_dim).to(device, dtype)

    def gradients(q, k, v, do, lengths, key_lengths):
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        batch = PackedBatch.from_lengths(lengths, device)
        keys = PackedBatch.from_lengths(key_lengths, device) if others else None
        out = ops.attention_varlen(*inputs, batch, key_batch=keys)
        return torch.autograd.grad(out, inputs, do)

    def split(q, k, v):
        return zip(q.split(lengths), k.split(key_lengths), v.split(key_lengths), strict=True)

    together = list(split(*gradients(q, k, v, do, lengths, key_lengths)))
    for i, (part, upstream) in enumerate(zip(split(q, k, v), do.split(lengths), strict=True)):
        alone = gradients(*part, upstream, lengths[i : i + 1], key_lengths[i : i + 1])
        assert all(map(torch.equal, alone, together[i])), (lengths[i], key_lengths[i])


def test_only_wanted_gradients_are_given(device):
    batch = PackedBatch.from_lengths([9, 3], device)
    for wanted in range(3):
        tensors = [torch.randn(12, 2, 16, device=device) for _ in range(3)]
        tensors[wanted].requires_grad_()
        ops.attention_varlen(*tensors, batch).sum().backward()
        assert [t.grad is not None for t in tensors] == [i == wanted for i in range(3)]


def test_nothing_outside_the_given_rows_is_read(device):
    """q, k and v lie in memory that is NaN around every head and every sequence."""
    for head_dim, lengths in ((48, [70, 3]), (16, [5, 1])):
        total = sum(lengths)
        around = torch.full((total + 128, 3, 2, head_dim + 16), torch.nan, device=device)
        inside = around[64 : 64 + total, :, :, :head_dim]
        inside.copy_(torch.randn(inside.shape))
        batch = PackedBatch.from_lengths(lengths, device)
        upstream = torch.full((total + 128, 2, head_dim), torch.nan, device=device)
        upstream = upstream[64 : 64 + total].copy_(torch.randn(total, 2, head_dim))
        results = []
        for given in (inside, inside.contiguous()):
            leaves = [t.detach().requires_grad_() for t in given.unbind(1)]
            out = ops.attention_varlen(*leaves, batch)
            results.append(torch.autograd.grad(out, leaves, upstream))
        assert all(map(torch.equal, *results))
        assert all(g.isfinite().all() for g in results[0])


BIAS = {  # from (B, H, Sq, Sk)
    "full": lambda b, h, sq, sk: (b, h, sq, sk),
    "per head": lambda b, h, sq, sk: (1, h, sq, sk),
    "per sequence": lambda b, h, sq, sk: (b, 1, sq, sk),
    "shared": lambda b, h, sq, sk: (sq, sk),
    "per key": lambda b, h, sq, sk: (b, 1, 1, sk),
}
PADDED = {  # (B, H, Sq, Sk, D)
    "self": (2, 2, 33, 33, 32),
    "walks": (2, 2, 20, 150, 64),
    "one query": (2, 3, 1, 70, 16),
}


def check_padded(shape, dtype, device, bias_shape, masked):
    b, h, sq, sk, d = shape
    q = torch.randn(b, sq, h, d).to(device, dtype).transpose(1, 2)
    k, v = torch.randn(b, sk, 2, h, d).to(device, dtype).permute(2, 0, 3, 1, 4)
    mask = None
    if masked:
        mask = (torch.rand(b, sk) < 0.6).to(device)
        mask[-1] = False  # a sequence without any key
    tensors = [q, k, v]
    if bias_shape is not None:
        tensors.append(torch.randn(BIAS[bias_shape](b, h, sq, sk)).to(device, dtype))
    grads = check_gradients(
        lambda q, k, v, bias=None: ops.attention(q, k, v, key_mask=mask, bias=bias),
        lambda q, k, v, bias=None: attention_ref(q, k, v, mask, bias, operands=dtype),
        tensors,
        torch.randn(b, h, sq, d).to(device, dtype),
        f"attention {shape}, bias {bias_shape}",
    )
    if masked:
        assert not any(g[-1].any() for g in grads[:3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [pytest.param(PADDED[n], id=n, marks=[pytest.mark.slow] * (n != "self")) for n in PADDED],
)
def test_padded_gradients_match_fp64(shape, dtype, device):
    for masked in (False, True):
        for bias_shape in (None, "full", "per head"):
            check_padded(shape, dtype, device, bias_shape, masked)


@pytest.mark.slow
@pytest.mark.parametrize("bias_shape", BIAS)
def test_every_broadcast_of_a_bias_gets_its_gradient(bias_shape, device):
    for shape in ((2, 2, 9, 17, 16), (3, 2, 70, 40, 32)):
        check_padded(shape, torch.float32, device, bias_shape, masked=True)


def test_masks_in_the_bias_stop_gradients(device):
    """-inf for some keys, and for every key of one query, whose gradients are zero."""
    q, k, v = (torch.randn(2, 2, 11, 16, device=device, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 2, 11, 11, device=device)
    bias[..., 3] = bias[:, :, 5] = -torch.inf
    bias.requires_grad_()
    out = ops.attention(q, k, v, bias=bias)
    dq, dk, dv, dbias = torch.autograd.grad(out, (q, k, v, bias), torch.randn_like(out))
    assert all(g.isfinite().all() for g in (dq, dk, dv, dbias))
    assert not dq[:, :, 5].any() and not dk[:, :, 3].any() and not dv[:, :, 3].any()
    assert not dbias[..., 3].any() and not dbias[:, :, 5].any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_lowest_numbers_are_rows_of_equals(dtype, masked, device):
    """finfo.min for all keys of a query gives each the same weight, as in torch and in fp64; -10000
    changes nothing; -inf masks beside either. Values and every gradient."""
    b, h, sq, sk, d = 2, 2, 7, 33, 16
    q, k, v = (torch.randn(b, h, s, d).to(device, dtype) for s in (sq, sk, sk))
    bias = torch.randn(b, h, sq, sk, device=device)
    lowest = torch.finfo(torch.float32).min
    bias[:, :, 1] = lowest
    bias[:, :, 2] = lowest
    bias[:, :, 2, ::3] = -torch.inf
    bias[:, :, 3] -= 10000.0
    bias[:, :, 4, ::2] = lowest  # beside usual ones: nothing
    bias[:, :, 5] = -torch.inf
    bias[:, :, 0] += 10000.0
    bias[:, :, 0, 3] = torch.finfo(torch.float32).max / 4  # and the other way
    mask = None
    if masked:
        mask = (torch.arange(sk) < torch.tensor([20, 33])[:, None]).to(device)
        bias[:, :, 6] = torch.where(mask[:, None], lowest, 0.0)  # what is masked does not count
    upstream = torch.randn(b, h, sq, d).to(device, dtype)
    grads = check_gradients(
        lambda q, k, v, bias: ops.attention(q, k, v, key_mask=mask, bias=bias),
        lambda q, k, v, bias: attention_ref(q, k, v, mask, bias, operands=dtype),
        (q, k, v, bias.to(dtype) if dtype != torch.float16 else bias.clamp(-6e4, 6e4).to(dtype)),
        upstream,
        f"lowest numbers, masked {masked}",
    )
    assert all(g.isfinite().all() for g in grads)
    if dtype == torch.float32 and not masked:
        out = ops.attention(q, k, v, bias=bias)
        torch.testing.assert_close(out[:, :, 1], v.mean(2), atol=1e-6, rtol=1e-5)
        # The reference makes the weights from log-sum-exp, which is lost there: each is 1 / n.
        one = torch.zeros_like(upstream)
        one[:, :, 1] = upstream[:, :, 1]
        leaf = v.clone().requires_grad_()
        (dv,) = torch.autograd.grad(ops.attention(q, k, leaf, bias=bias), leaf, one)
        torch.testing.assert_close(dv, (one.sum(2, keepdim=True) / sk).expand_as(v))


def test_a_bias_of_another_dtype_gets_its_own(device):
    """An fp32 bias, as a relative position table is under autocast, with 16-bit heads."""
    q, k, v = torch.randn(3, 2, 2, 9, 16).to(device, torch.bfloat16).requires_grad_().unbind(0)
    bias = torch.randn(1, 2, 9, 9, device=device, requires_grad=True)
    ops.attention(q, k, v, bias=bias).float().pow(2).sum().backward()
    wide = bias.detach().double().requires_grad_()
    attention_ref(q.double(), k.double(), v.double(), None, wide).pow(2).sum().backward()
    assert bias.grad.dtype == torch.float32
    torch.testing.assert_close(bias.grad.double(), wide.grad, atol=0.02, rtol=0.02)


@pytest.mark.slow
def test_packed_gradients_equal_padded_ones_at_the_size_of_bert(device):
    """bf16, twelve heads of 64, several tiles of queries and of keys."""
    lengths = [140, 1, 77]
    total = sum(lengths)
    qkv = torch.randn(total, 3, 12, 64).to(device, torch.bfloat16)
    upstream = torch.randn(total, 12, 64).to(device, torch.bfloat16)
    mask = torch.arange(140, device=device) < torch.tensor(lengths, device=device)[:, None]
    batch = PackedBatch.from_mask(mask)
    packed = qkv.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ops.attention_qkv(packed, batch), packed, upstream)
    heads_first = [batch.unpack(t).transpose(1, 2).detach().requires_grad_() for t in qkv.unbind(1)]
    out = ops.attention(*heads_first, key_mask=mask)
    padded = torch.autograd.grad(out, heads_first, batch.unpack(upstream).transpose(1, 2))
    for mine, other in zip(grad.unbind(1), padded, strict=True):
        torch.testing.assert_close(
            mine, batch.pack(other.transpose(1, 2)), atol=2e-2, rtol=2e-2
        )  # tiles differ, by a rounding
