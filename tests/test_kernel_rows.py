"""The row kernels - LayerNorm, embedding, softmax - against their references."""

import pytest
import torch

import fastbert
from fastbert import ops
from fastbert.ops.reference import embed_ref, layer_norm_ref, softmax_ref
from fastbert.testing import assert_within_budget

pytest.importorskip("triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The smallest and largest, a prime-ish width that no vector divides, MiniLM, BERT base and large.
WIDTHS = (32, 77, 384, 768, 1024, 8192)


@pytest.fixture(autouse=True)
def _kernels():
    with fastbert.backend("triton"):
        yield


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


def check_layer_norm(x, weight, bias, residual=None, input_bias=None, eps=1e-12):
    actual = ops.layer_norm(x, weight, bias, eps=eps, residual=residual, input_bias=input_bias)
    x64, w64, b64, r64, i64 = double(x, weight, bias, residual, input_bias)
    oracle = layer_norm_ref(x64, w64, b64, eps, r64, i64)
    baseline = layer_norm_ref(x, weight, bias, eps, residual, input_bias)
    assert_within_budget(actual, oracle, baseline, f"layer_norm {tuple(x.shape)}")
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
    _, mean, rstd = layernorm_fwd(x, residual, None, None, None, eps=1e-5)
    z = x.double() + residual.double()
    assert mean.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(mean.double(), z.mean(-1), atol=1e-6, rtol=1e-6)
    exact = (z.var(-1, unbiased=False) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.double(), exact, atol=0, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", (32, 77, 384, 768, 8192))
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_embed_matches_reference(width, dtype, id_dtype, device):
    tables = [torch.randn(rows, width).to(device, dtype) for rows in (23, 11, 2)]
    weight, bias = torch.randn(2, width).to(device, dtype)
    ids = [torch.randint(0, t.shape[0], (9,)).to(device, id_dtype) for t in tables]
    ids[0][:2] = torch.tensor([0, 22])
    for last in ((ids[2], tables[2]), (None, None)):
        args = (ids[0], ids[1], last[0], tables[0], tables[1], last[1], weight, bias)
        actual = ops.embed(*args, eps=1e-12)
        wide = [t if t is None or not t.is_floating_point() else t.double() for t in args]
        oracle, baseline = embed_ref(*wide, eps=1e-12), embed_ref(*args, eps=1e-12)
        assert_within_budget(actual, oracle, baseline, f"embed {width}")


def test_embed_makes_an_id_outside_its_table_nan_and_leaves_the_rest(device):
    from fastbert.kernels.embedding import embedding_fwd

    word, position = torch.randn(2, 10, 32, device=device)
    ids = torch.tensor([3, 10, -1, 2**40, 9], device=device)
    zeros = torch.zeros(5, dtype=torch.long, device=device)
    y, _, _ = embedding_fwd(ids, zeros, None, word, position, None, None, None, eps=1e-12)
    assert y.isnan().all(1).tolist() == [False, True, True, True, False]
    assert not y[[0, 4]].isnan().any()


SOFTMAX_SHAPES = ((5,), (3, 33), (2, 2, 3, 16), (2, 3, 5, 77), (1, 1, 2, 8192), (1, 2, 40, 1))


def check_softmax(x, mask=None, scale=1.0):
    actual = ops.softmax(x, mask=mask, scale=scale)
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    oracle, baseline = softmax_ref(x.double(), wide, scale), softmax_ref(x, mask, scale)
    assert_within_budget(actual, oracle, baseline, f"softmax {tuple(x.shape)}")
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
