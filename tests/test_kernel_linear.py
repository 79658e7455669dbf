"""The linear kernels against their reference, and the erf inside GELU against scipy-grade erf."""

import pytest
import torch
import torch.nn.functional as F
from tiny import DTYPES

import fastbert
from fastbert import ops
from fastbert.ops.reference import bias_activation_ref, linear_ref
from fastbert.testing import assert_matches, with_gradients

pytest.importorskip("triton")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
SIZES = {  # (M, N, K)
    "one row": (1, 64, 32),
    "primes": (37, 53, 71),
    "above a tile": (65, 129, 65),
    "several tiles, more than programs": (150, 300, 64),
}


def check(actual, specification, arguments, name):
    """The kernels compute in fp32 and round once."""
    assert_matches(actual, specification, arguments, name, inside=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_fused_product_matches_reference(size, dtype, device):
    from fastbert.kernels.linear import linear_activation_fwd

    m, n, k = size
    x, weight = torch.randn(m, k).to(device, dtype), torch.randn(n, k).to(device, dtype)
    bias = torch.randn(n).to(device, dtype)
    for given in (bias, None):
        actual = linear_activation_fwd(x, weight, given, activation="gelu")
        check(actual, linear_ref, (x, weight, given, "gelu"), f"linear {size}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_match_reference(activation, dtype, device):
    from fastbert.kernels.linear import bias_activation_fwd_, linear_activation_fwd

    x, weight = torch.randn(9, 33).to(device, dtype), torch.randn(70, 33).to(device, dtype)
    bias = torch.randn(70).to(device, dtype)
    actual = linear_activation_fwd(x, weight, bias, activation=activation)
    check(actual, linear_ref, (x, weight, bias, activation), f"fused {activation}")

    for rows, columns in ((5, 70), (3, 1500)):
        z = (3 * torch.randn(rows, columns)).to(device, dtype)
        bias = torch.randn(columns).to(device, dtype)
        given = z.clone()
        actual = bias_activation_fwd_(z, bias, activation=activation)
        assert actual is z
        arguments = (given, bias, activation)
        check(actual, bias_activation_ref, arguments, f"behind a product, {activation}")


def test_strided_inputs_and_no_rows(device):
    from fastbert.kernels.linear import linear_activation_fwd

    x = torch.randn(7, 3, 32, device=device)[:, 1]
    weight = torch.randn(32, 40, device=device).t()
    actual = linear_activation_fwd(x, weight, None, activation="relu")
    check(actual, linear_ref, (x, weight, None, "relu"), "strided")
    assert linear_activation_fwd(x[:0], weight, None, activation="relu").shape == (0, 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_is_erf_over_the_whole_range(dtype, device):
    """Not the tanh form, and right in the far tails, where an approximation would show."""
    from fastbert.kernels.linear import bias_activation_fwd_

    x = torch.linspace(-12, 12, 4001).to(device, dtype)[None]
    actual = bias_activation_fwd_(x.clone(), None, activation="gelu")
    check(actual, F.gelu, (x,), f"gelu in {dtype}")
    assert (actual[0, x[0] < -8].abs() < 1e-6).all()
    tanh_form = F.gelu(x.float(), approximate="tanh").to(dtype)
    with pytest.raises(AssertionError, match="over the budget"):
        check(tanh_form, F.gelu, (x,), "the tanh form")


def check_gradients(function, tensors, upstream, name):
    """On the kernels, against the same op in torch."""
    with fastbert.backend("triton"):
        actual = with_gradients(function)(upstream, *tensors)
    assert all(t.dtype == tensors[0].dtype for t in actual)
    with fastbert.backend("torch"):
        assert_matches(actual, with_gradients(function), (upstream, *tensors), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("recompute", [False, True])
def test_linear_gradients_match_fp64(activation, dtype, recompute, device):
    """Keeping what enters the activation, or computing the product once more."""
    x = torch.randn(2, 19, 33).to(device, dtype)
    weight, bias = torch.randn(70, 33).to(device, dtype), torch.randn(70).to(device, dtype)
    upstream = torch.randn(2, 19, 70).to(device, dtype)
    for parts in ((x, weight, bias), (x, weight)):
        check_gradients(
            lambda *parts: ops.linear(*parts, activation=activation, recompute=recompute),
            parts, upstream, activation,
        )  # fmt: skip


def feed_forward(activation, recompute):
    def run(x, gamma, beta, w1, b1, w2, b2):
        """A norm before it, as in a layer, so that its result is made again in backward."""
        hidden = ops.layer_norm(x, gamma, beta, eps=1e-5)
        return ops.feed_forward_add_norm(
            hidden, w1, b1, activation, w2, b2, gamma, beta, eps=1e-5, recompute=recompute
        )

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("recompute", [False, True])
def test_feed_forward_gradients_match_fp64(activation, dtype, recompute, device):
    tensors = [
        torch.randn(shape).to(device, dtype)
        for shape in ((37, 48), (48,), (48,), (96, 48), (96,), (48, 96), (48,))
    ]
    upstream = torch.randn(37, 48).to(device, dtype)
    check_gradients(feed_forward(activation, recompute), tensors, upstream, activation)


def test_stacked_products_give_each_weight_its_gradient(device):
    x = torch.randn(9, 32, device=device)
    parts = [torch.randn(n, 32, device=device) for n in (16, 16, 8)]
    biases = [torch.randn(n, device=device) for n in (16, 16, 8)]
    upstream = torch.randn(9, 40, device=device)
    check_gradients(
        lambda x, *rest: ops.linear_stacked(x, rest[:3], rest[3:]), (x, *parts, *biases), upstream,
        "stacked",
    )  # fmt: skip


def test_frozen_weights_get_no_gradient_and_keep_no_input(device):
    """What a frozen layer or LoRA beside it leaves: x still has its gradient."""
    with fastbert.backend("triton"):
        x = torch.randn(9, 32, device=device, requires_grad=True)
        weight, bias = torch.randn(48, 32, device=device), torch.randn(48, device=device)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (saved.append(t.data_ptr()), t)[1], lambda t: t
        ):
            y = ops.linear(x, weight, bias)
        y.sum().backward()
        assert x.data_ptr() not in saved
        torch.testing.assert_close(x.grad, weight.sum(0).expand(9, 32))


def test_activation_gradients_with_more_rows_than_programs(device, monkeypatch):
    from fastbert.kernels import linear

    monkeypatch.setattr(linear, "num_sms", lambda device: 1)
    x = torch.randn(70, 1500, device=device)
    dy = torch.randn(70, 1500, device=device)
    dx, y, dbias = linear.activation_bwd(
        dy, x, activation="gelu", bias_dtype=torch.float32, again=True
    )
    leaf = x.double().requires_grad_()
    out = F.gelu(leaf)
    (exact,) = torch.autograd.grad(out, leaf, dy.double())
    torch.testing.assert_close(dx.double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y.double(), out.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dbias.double(), exact.sum(0), atol=1e-4, rtol=1e-5)


def test_a_norm_changed_in_place_is_kept_itself(device):
    """What is noted on a norm's result holds for that result only."""
    weight = torch.randn(48, 32, device=device, requires_grad=True)
    x = torch.randn(9, 32, device=device, requires_grad=True)
    with fastbert.backend("triton"):
        y = ops.layer_norm(x, None, None, eps=1e-5)
        y.mul_(2.0)
        out = ops.linear(y, weight)
        (grad,) = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(grad, y.detach().sum(0).expand(48, 32))
