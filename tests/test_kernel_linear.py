"""The linear kernels against their reference, and the erf inside GELU against scipy-grade erf."""

import pytest
import torch
import torch.nn.functional as F

from fastbert.ops.reference import bias_activation_ref, linear_ref
from fastbert.testing import assert_within_budget

pytest.importorskip("triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
SIZES = {  # (M, N, K)
    "one row": (1, 64, 32),
    "primes": (37, 53, 71),
    "above a tile": (65, 129, 65),
    "several tiles, more than programs": (150, 300, 64),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_fused_product_matches_reference(size, dtype, device):
    from fastbert.kernels.linear import linear_activation_fwd

    m, n, k = size
    x, weight = torch.randn(m, k).to(device, dtype), torch.randn(n, k).to(device, dtype)
    bias = torch.randn(n).to(device, dtype)
    for given in (bias, None):
        actual = linear_activation_fwd(x, weight, given, activation="gelu")
        wide = None if given is None else given.double()
        oracle = linear_ref(x.double(), weight.double(), wide, activation="gelu")
        baseline = linear_ref(x, weight, given, activation="gelu")
        assert_within_budget(actual, oracle, baseline, f"linear {size}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_match_reference(activation, dtype, device):
    from fastbert.kernels.linear import bias_activation_fwd_, linear_activation_fwd

    x, weight = torch.randn(9, 33).to(device, dtype), torch.randn(70, 33).to(device, dtype)
    bias = torch.randn(70).to(device, dtype)
    actual = linear_activation_fwd(x, weight, bias, activation=activation)
    oracle = linear_ref(x.double(), weight.double(), bias.double(), activation=activation)
    baseline = linear_ref(x, weight, bias, activation=activation)
    assert_within_budget(actual, oracle, baseline, f"fused {activation}")

    for rows, columns in ((5, 70), (3, 1500)):
        z = (3 * torch.randn(rows, columns)).to(device, dtype)
        bias = torch.randn(columns).to(device, dtype)
        oracle = bias_activation_ref(z.double(), bias.double(), activation)
        baseline = bias_activation_ref(z, bias, activation)
        actual = bias_activation_fwd_(z, bias, activation=activation)
        assert actual is z
        assert_within_budget(actual, oracle, baseline, f"behind a product, {activation}")


def test_strided_inputs_and_no_rows(device):
    from fastbert.kernels.linear import linear_activation_fwd

    x = torch.randn(7, 3, 32, device=device)[:, 1]
    weight = torch.randn(32, 40, device=device).t()
    actual = linear_activation_fwd(x, weight, None, activation="relu")
    oracle = linear_ref(x.double(), weight.double(), activation="relu")
    assert_within_budget(actual, oracle, linear_ref(x, weight, activation="relu"), "strided")
    assert linear_activation_fwd(x[:0], weight, None, activation="relu").shape == (0, 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_is_erf_over_the_whole_range(dtype, device):
    """Not the tanh form, and right in the far tails, where an approximation would show."""
    from fastbert.kernels.linear import bias_activation_fwd_

    x = torch.linspace(-12, 12, 4001).to(device, dtype)[None]
    oracle, baseline = F.gelu(x.double()), F.gelu(x)
    actual = bias_activation_fwd_(x.clone(), None, activation="gelu")
    assert_within_budget(actual, oracle, baseline, f"gelu in {dtype}")
    assert (actual[0, x[0] < -8].abs() < 1e-6).all()
    if dtype == torch.float32:
        tanh_form = F.gelu(x.double(), approximate="tanh")
        assert (actual - oracle).abs().max() < 0.01 * (tanh_form - oracle).abs().max()
