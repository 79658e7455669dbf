"""The row kernels - LayerNorm, embedding, softmax - against their references."""

import pytest
import torch
from tiny import DTYPES

import fastbert
from fastbert import ops
from fastbert.ops.reference import embed_ref, layer_norm_ref, softmax_ref
from fastbert.testing import assert_matches, with_gradients

pytest.importorskip("triton")
# The smallest and largest, a prime-ish width that no vector divides, MiniLM, BERT base and large.
WIDTHS = (32, 77, 384, 768, 1024, pytest.param(8192, marks=pytest.mark.slow))


@pytest.fixture(autouse=True)
def _kernels():
    with fastbert.backend("triton"):
        yield


def check(actual, specification, arguments, name):
    """The kernels compute in fp32 and round once."""
    assert_matches(actual, specification, arguments, name, inside=torch.float32)


def check_layer_norm(x, weight, bias, residual=None, input_bias=None, eps=1e-12):
    actual = ops.layer_norm(x, weight, bias, eps=eps, residual=residual, input_bias=input_bias)
    arguments = (x, weight, bias, eps, residual, input_bias)
    check(actual, layer_norm_ref, arguments, f"layer_norm {tuple(x.shape)}")
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm_matches_reference(width, dtype, device):
    rows = 3 if width > 1024 else 7
    x, residual = torch.randn(2, rows, width).to(device, dtype)
    weight, bias, input_bias = torch.randn(3, width).to(device, dtype)
    check_layer_norm(x, weight, bias)
    check_layer_norm(x, weight, bias, residual)
    check_layer_norm(x, weight, bias, residual, input_bias)
    check_layer_norm(x, None, None, None, input_bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_edges(dtype, device):
    weight, bias = torch.randn(2, 64).to(device, dtype)
    for rows in (1, 2, 33):  # below, at and above the rows of a program
        check_layer_norm(torch.randn(rows, 64).to(device, dtype), weight, bias)
    strided = torch.randn(5, 3, 64).to(device, dtype)[:, 1]
    check_layer_norm(strided, weight, bias, torch.randn(64, 5).to(device, dtype).t())
    check_layer_norm(torch.randn(2, 3, 64).to(device, dtype), weight, bias)
    expanded = torch.randn(1, 64).to(device, dtype).expand(4, 64)
    check_layer_norm(expanded, weight, bias, expanded)
    assert ops.layer_norm(strided[:0], weight, bias, eps=1e-12).shape == (0, 64)


def test_layer_norm_keeps_precision_under_a_large_offset(device):
    x = torch.randn(4, 768, device=device) + 1000.0
    actual = check_layer_norm(x, None, None)
    torch.testing.assert_close(actual.mean(-1), torch.zeros(4, device=device), atol=1e-4, rtol=0)
    check_layer_norm(torch.full((2, 64), 3.0, device=device), None, None, eps=1e-5)


def test_layer_norm_statistics_are_fp32_and_right(device):
    from fastbert.kernels.layernorm import layernorm_fwd

    x, residual = torch.randn(2, 5, 96).to(device, torch.bfloat16)
    _, z, statistics = layernorm_fwd(x, residual, None, None, None, eps=1e-5, keep_statistics=True)
    assert z is None and statistics.dtype == torch.float32
    mean, rstd = statistics
    z = x.double() + residual.double()
    torch.testing.assert_close(mean.double(), z.mean(-1), atol=1e-6, rtol=1e-6)
    exact = (z.var(-1, unbiased=False) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.double(), exact, atol=0, rtol=1e-5)


def check_gradients(function, reference, tensors, name, upstream=None):
    if upstream is None:
        upstream = torch.randn(reference(*tensors).shape).to(tensors[0])
    _, *grads = actual = with_gradients(function)(upstream, *tensors)
    assert all(g.dtype == t.dtype for g, t in zip(grads, tensors, strict=True))
    assert_matches(actual, with_gradients(reference), (upstream, *tensors), name)
    return grads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm_gradients_match_fp64(width, dtype, device):
    rows = 3 if width > 1024 else 37
    x, residual = torch.randn(2, rows, width).to(device, dtype)
    weight, bias, input_bias = torch.randn(3, width).to(device, dtype)

    def kernel(x, w, b, r=None, i=None):
        return ops.layer_norm(x, w, b, eps=1e-5, residual=r, input_bias=i)

    def torchs(x, w, b, r=None, i=None):
        return layer_norm_ref(x, w, b, 1e-5, r, i)

    for tensors in ((x, weight, bias), (x, weight, bias, residual, input_bias)):
        check_gradients(kernel, torchs, tensors, f"layer_norm {width}")
    check_gradients(
        lambda x, r: kernel(x, None, None, r), lambda x, r: torchs(x, None, None, r), (x, residual),
        "layer_norm without weights",
    )  # fmt: skip


def test_layer_norm_gradients_with_more_rows_than_programs(device, monkeypatch):
    """Every program walks over several blocks of rows and adds up its sums."""
    from fastbert.kernels import layernorm

    monkeypatch.setattr(layernorm, "num_sms", lambda device: 1)
    x, residual = torch.randn(2, 150, 96, device=device)
    weight, bias, input_bias = torch.randn(3, 96, device=device)
    check_gradients(
        lambda x, w, b, r, i: ops.layer_norm(x, w, b, eps=1e-5, residual=r, input_bias=i),
        lambda x, w, b, r, i: layer_norm_ref(x, w, b, 1e-5, r, i),
        (x, weight, bias, residual, input_bias), "many rows",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_rows_come_in_the_dtype_of_their_parameters(dtype, device):
    from fastbert.kernels._sums import column_sums

    shares = torch.randn(3, 70, 50, device=device)
    found, exact = column_sums(shares, dtype), column_sums(shares, torch.float32)
    assert found.dtype == dtype
    assert torch.equal(found, exact.to(dtype)), "rounded once"
    assert_matches(exact, lambda shares: shares.sum(1), (shares,), "column sums")


def test_layer_norm_gradients_from_any_upstream_and_to_some_inputs(device):
    x, residual = torch.randn(2, 9, 64, device=device)
    weight, bias = torch.randn(2, 64, device=device)
    wide = torch.randn(64, 9, device=device)
    for upstream in (wide.t(), torch.ones((), device=device).expand(9, 64)):
        check_gradients(
            lambda x, w, b, r: ops.layer_norm(x, w, b, eps=1e-5, residual=r),
            lambda x, w, b, r: layer_norm_ref(x, w, b, 1e-5, r),
            (x, weight, bias, residual), "strided upstream", upstream,
        )  # fmt: skip
    for wanted in range(4):
        leaves = [t.clone() for t in (x, weight, bias, residual)]
        leaves[wanted].requires_grad_()
        ops.layer_norm(*leaves[:3], eps=1e-5, residual=leaves[3]).sum().backward()
        assert [t.grad is not None for t in leaves] == [i == wanted for i in range(4)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_layer_norm_under_autocast_is_fp32_like_torchs(dtype, device):
    """A 16-bit product, an fp32 residual and fp32 weights: what autocast leads to."""
    x = torch.randn(9, 64).to(device, dtype)
    residual = torch.randn(9, 64, device=device)
    weight, bias = torch.randn(2, 64, device=device)
    tensors = (x, residual, weight, bias)

    def run(x, r, w, b):
        with torch.autocast(device, dtype):
            out = ops.layer_norm(x, w, b, eps=1e-5, residual=r)
        assert out.dtype == torch.float32
        return out

    wide = [t.double().requires_grad_() for t in tensors]
    leaves = [t.detach().requires_grad_() for t in tensors]
    oracle = layer_norm_ref(wide[0], wide[2], wide[3], 1e-5, wide[1])
    upstream = torch.randn(9, 64, device=device)
    exact = torch.autograd.grad(oracle, wide, upstream.double())
    grads = torch.autograd.grad(run(*leaves), leaves, upstream)
    for got, wanted, t in zip(grads, exact, tensors, strict=True):
        assert got.dtype == t.dtype
        tolerance = 2 * torch.finfo(t.dtype).eps
        torch.testing.assert_close(got.double(), wanted, atol=tolerance * 4, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_can_be_had_again_from_its_sum(dtype, device):
    from fastbert.kernels.layernorm import layernorm_again, layernorm_fwd

    x, residual = torch.randn(2, 9, 77).to(device, dtype)
    weight, bias = torch.randn(2, 77).to(device, dtype)
    y, z, statistics = layernorm_fwd(x, residual, None, weight, bias, eps=1e-5, keep_sum=True,
                                     keep_statistics=True)  # fmt: skip
    again = layernorm_again(z, statistics, weight, bias, out_dtype=dtype)
    if dtype == torch.float32:
        assert torch.equal(again, y)
    assert_matches(again, layer_norm_ref, (x, weight, bias, 1e-5, residual), "again")


def run_embed(ids, positions, types, padding_idx=None):
    def run(word, position, token_type, w, b):
        return ops.embed(
            ids, positions, types, word, position, token_type, w, b, eps=1e-5,
            padding_idx=padding_idx,
        )  # fmt: skip

    def reference(word, position, token_type, w, b):
        args = (ids, positions, types, word, position, token_type, w, b)
        return embed_ref(*args, 1e-5, padding_idx)

    return run, reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", (32, 77, 768))
def test_embed_gradients_match_fp64(width, dtype, device):
    """Many tokens share a row, most rows get none, and one row is padding, which never learns."""
    tables = [torch.randn(rows, width).to(device, dtype) for rows in (100, 23, 2)]
    weight, bias = torch.randn(2, width).to(device, dtype)
    ids = torch.randint(0, 12, (60,)).to(device)
    positions, types = torch.arange(60, device=device) % 23, torch.arange(60, device=device) % 2
    for padding_idx in (None, 3, "defaults"):
        if padding_idx == "defaults":
            ids, positions, types, padding_idx = ids[:23], None, None, None
        run, reference = run_embed(ids, positions, types, padding_idx)
        grads = check_gradients(run, reference, (*tables, weight, bias), f"embed {width}")
        assert not grads[0][12:].any()
        if padding_idx is not None:
            assert not grads[0][3].any()


def test_embed_gradients_repeat_bit_for_bit(device):
    word, position = torch.randn(2, 10, 32, device=device)
    weight, bias = torch.randn(2, 32, device=device)
    ids, zeros = torch.tensor([3, 3, 9, 3], device=device), torch.zeros(4, dtype=torch.long)
    zeros = zeros.to(device)

    def gradient():
        leaf = word.clone().requires_grad_()
        out = ops.embed(ids, zeros, None, leaf, position, None, weight, bias, eps=1e-5)
        return torch.autograd.grad(out.pow(2).sum(), leaf)[0]

    assert torch.equal(gradient(), gradient())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", (32, 77, 384, 768, 8192))
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_embed_matches_reference(width, dtype, id_dtype, device):
    tables = [torch.randn(rows, width).to(device, dtype) for rows in (23, 11, 2)]
    weight, bias = torch.randn(2, width).to(device, dtype)
    ids = [torch.randint(0, t.shape[0], (9,)).to(device, id_dtype) for t in tables]
    ids[0][:2] = torch.tensor([0, 22])
    for positions, *last in ((ids[1], ids[2], tables[2]), (ids[1], None, None),
                             (None, None, tables[2]), (None, None, None)):  # fmt: skip
        args = (ids[0], positions, last[0], tables[0], tables[1], last[1], weight, bias)
        actual = ops.embed(*args, eps=1e-12)
        check(actual, embed_ref, (*args, 1e-12), f"embed {width}")


def test_embed_makes_an_id_outside_its_table_nan_and_leaves_the_rest(device):
    from fastbert.kernels.embedding import embedding_fwd

    word, position = torch.randn(2, 10, 32, device=device)
    ids = torch.tensor([3, 10, -1, 2**40, 9], device=device)
    zeros = torch.zeros(5, dtype=torch.long, device=device)
    y, *_ = embedding_fwd(ids, zeros, None, word, position, None, None, None, eps=1e-12)
    assert y.isnan().all(1).tolist() == [False, True, True, True, False]
    assert not y[[0, 4]].isnan().any()


SOFTMAX_SHAPES = ((5,), (3, 33), (2, 2, 3, 16), (2, 3, 5, 77), (1, 1, 2, 8192), (1, 2, 40, 1))


def check_softmax(x, mask=None, scale=1.0):
    actual = ops.softmax(x, mask=mask, scale=scale)
    check(actual, softmax_ref, (x, mask, scale), f"softmax {tuple(x.shape)}")
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SOFTMAX_SHAPES, ids=str)
def test_softmax_matches_reference(shape, dtype, device):
    x = (3 * torch.randn(shape)).to(device, dtype)
    check_softmax(x)
    check_softmax(x, scale=0.125)
    keep = torch.rand(shape).to(device) < 0.6
    keep.view(-1, shape[-1])[0] = False
    actual = check_softmax(x, keep)
    assert not actual.view(-1, shape[-1])[0].any()
    check_softmax(x, torch.randn(shape).to(device, dtype), scale=2.0)


def test_softmax_broadcasts_masks_and_takes_strides(device):
    x = torch.randn(2, 7, 3, 33, device=device).transpose(1, 2)
    for shape in ((2, 1, 1, 33), (1, 3, 1, 1), (1, 1, 7, 33), (33,)):
        check_softmax(x, torch.randn(shape, device=device))
        check_softmax(x, torch.rand(shape, device=device) < 0.7)
    check_softmax(torch.randn(33, 4, device=device).t())


def test_softmax_properties(device):
    x = torch.randn(6, 50, device=device)
    y = ops.softmax(x)
    torch.testing.assert_close(y.sum(-1), torch.ones(6, device=device))
    torch.testing.assert_close(ops.softmax(x + 100.0), y, atol=1e-5, rtol=1e-4)
    assert torch.equal(ops.softmax(x), y)
    assert torch.equal(ops.softmax(x[2:3]), y[2:3])  # a row does not depend on its neighbours
    huge = ops.softmax(x * 1e30)
    assert huge.isfinite().all()
    assert ops.softmax(x[:0]).shape == (0, 50)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SOFTMAX_SHAPES[1:5], ids=str)
def test_softmax_gradients_match_fp64(shape, dtype, device):
    x = (2 * torch.randn(shape)).to(device, dtype)
    mask = torch.randn(shape[-1]).to(device, dtype)
    check_gradients(
        lambda x, m: ops.softmax(x, mask=m, scale=0.5), lambda x, m: softmax_ref(x, m, 0.5),
        (x, mask), f"softmax {shape}",
    )  # fmt: skip
    keep = torch.rand(shape).to(device) < 0.6
    keep.view(-1, shape[-1])[0] = False
    (grad,) = check_gradients(
        lambda x: ops.softmax(x, mask=keep), lambda x: softmax_ref(x, keep), (x,), "bool mask"
    )
    assert not grad.view(-1, shape[-1])[0].any() and not grad[~keep].any()


def test_softmax_gradient_of_every_broadcast_of_a_mask(device):
    x = torch.randn(2, 7, 3, 33, device=device).transpose(1, 2)
    for shape in ((2, 1, 1, 33), (1, 3, 7, 33), (7, 33), (33,)):
        mask = torch.randn(shape, device=device)
        check_gradients(
            lambda x, m: ops.softmax(x, mask=m), lambda x, m: softmax_ref(x, m), (x, mask),
            f"mask {shape}",
        )  # fmt: skip
