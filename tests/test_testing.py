"""The rule by which results are compared: right ones pass, few or many; wrong ones do not."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import one_is_quick

from fastbert import testing
from fastbert.testing import assert_matches, assert_within_budget, with_gradients

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def permuted_product(x, weight, dtype):
    """``x @ weight.T`` in fp32, in another order and in blocks, rounded once."""
    order = torch.randperm(x.shape[1])
    acc = torch.zeros(x.shape[0], weight.shape[0])
    for columns in order.split(16):
        acc += x.float()[:, columns] @ weight.float()[:, columns].T
    return acc.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_right_results_pass_however_few_they_are(dtype):
    """Among so few values torch is often luckier than any other order of the same sum."""
    for rows in (1, 2, 3, 10):
        for length in (2, 33, 200):
            for _ in range(20):
                x, weight = torch.randn(rows, length), torch.randn(1, length)
                x, weight = x.to(dtype), weight.to(dtype)
                actual = permuted_product(x, weight, dtype)
                assert_matches(actual, F.linear, (x, weight), "few", inside=torch.float32)


def test_values_of_a_row_do_not_count_as_many():
    """Ten queries, scores of hundreds: a row's values are off together, by the error of a score."""
    for _ in range(60):
        q, k, v = torch.randn(10, 16) * 8, *torch.randn(2, 8, 16) * 8

        def attend(q, k, v):
            return torch.softmax(q @ k.T / 4, -1) @ v

        order = torch.randperm(16)
        other = torch.softmax(q[:, order] @ k[:, order].T / 4, -1) @ v
        assert_matches(other, attend, (q, k, v), "rows")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, w: F.linear(x, w).half(),
        lambda x, w: F.linear(x[:, :-1], w[:, :-1]),
        lambda x, w: F.linear(x, w) * 1.001,
    ],
    ids=["fp16", "tail", "scale"],
)
def test_wrong_results_do_not_pass(wrong, dtype):
    x, weight = torch.randn(40, 200).to(dtype), torch.randn(8, 200).to(dtype)
    actual = wrong(x.float(), weight.float())
    if dtype == actual.dtype == torch.float16:
        return  # that is no fault but the rounding to what is stored
    with pytest.raises(AssertionError, match="over the budget"):
        assert_matches(actual.to(dtype), F.linear, (x, weight), "wrong", inside=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_wrong_factor_is_found_below_the_rounding_of_every_value(dtype):
    """torch stores 16-bit values on the way here, so that single values show nothing."""
    x, weight, more = (torch.randn(n, 64).to(dtype) / 4 for n in (500, 64, 64))

    def specification(x, weight, more):
        return F.linear(F.linear(x, weight), more)

    right = specification(x.float(), weight.float(), more.float())
    assert_matches(right.to(dtype), specification, (x, weight, more), "right")
    scaled = specification(x.float(), weight.float() * 1.001, more.float())
    with pytest.raises(AssertionError, match=r"as if argument \d were scaled by 1 \+-"):
        assert_matches(scaled.to(dtype), specification, (x, weight, more), "scaled")


@pytest.mark.parametrize("inside", [None, torch.float32], ids=["as stored", "in fp32"])
@pytest.mark.parametrize("dtype", one_is_quick(DTYPES), ids=str)
def test_ending_early_changes_no_verdict(dtype, inside, monkeypatch):
    """Of results that are off by ever more: by nothing, by rounding, by a factor, by much."""
    early = testing._Trial.is_settled
    runs, verdicts = [], []
    for seed, off in enumerate((0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 0.1)):
        torch.manual_seed(seed)
        x, weight = torch.randn(64, 100).to(dtype), torch.randn(8, 100).to(dtype)
        exact = x.double() @ weight.double().T
        for wrong in (exact * (1 + off), exact + off * exact.abs().max() * torch.randn(64, 8)):
            found = []
            for settled in (early, lambda *args: False):
                monkeypatch.setattr(testing._Trial, "is_settled", settled)
                called = []

                def specification(x, weight, called=called):
                    called.append(x)
                    return F.linear(x, weight)

                try:
                    args = (x, weight), "off"
                    assert_matches(wrong.to(dtype), specification, *args, inside=inside)
                    found.append(None)
                except AssertionError as error:
                    found.append(str(error))
                runs.append(len(called))
            assert found[0] == found[1], (off, found)
            verdicts.append(found[0] is None)
    assert any(verdicts) and not all(verdicts)
    assert min(runs[::2]) <= 4 < 16 <= min(runs[1::2])


# Seeds for whose results sixteen runs of torch are too few.
@pytest.mark.parametrize("seed", [2514, 3507, 16073])
def test_a_row_that_stands_out_among_many_is_given_enough_runs(seed):
    sizes = 1e-3 * torch.arange(1, 1001).double() ** -0.5

    def rounded(x, salt):
        """x, off by what its bits say: normally distributed, of the size of the row."""
        if x.dtype == torch.float64:
            return x[:, :1]
        bits = (x.view(torch.int32).long() * torch.tensor([1, 1000003, 998244353, 19260817])).sum(1)
        generator, noise = torch.Generator().manual_seed(salt), torch.zeros(1000).double()
        for i in range(12):
            odd = int(torch.randint(1, 2**30, (), generator=generator)) * 2 + 1
            mixed = (bits * odd + i * 7919) & 0xFFFFFFFF
            for shift in (15, 13):
                mixed = (mixed ^ (mixed >> shift)) * odd & 0xFFFFFFFF
            noise += mixed.double() / 2**32 - 0.5
        return (x[:, 0].double() + sizes * noise).float()[:, None]

    torch.manual_seed(seed)
    x = 1 + torch.rand(1000, 4)
    actual = rounded(x, 10**6 + seed)
    assert_matches(actual, lambda x: rounded(x, seed), (x,), "as good as torch")
    with pytest.raises(AssertionError, match="over the budget"):
        four_times = x[:, :1] + 4 * (actual - x[:, :1])
        assert_matches(four_times, lambda x: rounded(x, seed), (x,), "not as good")


def test_storing_costs_half_a_unit_in_the_last_place():
    x = torch.tensor([0.3, 1.0, 1.7, 100.3, 0.01])
    for dtype in DTYPES[1:]:
        assert_matches(x.to(dtype), lambda x: x * 1.0, (x,), "rounded", inside=torch.float32)
        truncated = (x.to(dtype).view(torch.int16) - 1).view(dtype)
        with pytest.raises(AssertionError, match="over the budget"):
            assert_matches(truncated, lambda x: x * 1.0, (x,), "down", inside=torch.float32)


def test_the_worst_of_torchs_ways_counts():
    x = torch.randn(50, 3)
    coarse = (x * 3.0) * (1 + 3e-6)
    with pytest.raises(AssertionError, match="over the budget"):
        assert_matches(coarse, lambda x: x * 3.0, (x,), "one way")

    def other(x):
        return x * 3.0 if x.dtype == torch.float64 else x * 3.0 * (1 + 2e-6)

    assert_matches(coarse, lambda x: x * 3.0, (x,), "two ways", others=[other])


def test_quantiles_are_those_of_student():
    """Two-sided, by scipy.stats.t.isf: never smaller, close where there are enough degrees."""
    for degrees, one_in, exact, above in (
        (4, 1e9, 278.31, 0.4), (8, 1e9, 31.962, 0.06), (16, 1e3, 4.0150, 0.01),
        (16, 1e9, 12.610, 0.01), (30, 1e12, 11.722, 0.01), (1000, 1e9, 6.1684, 1e-4),
    ):  # fmt: skip
        assert exact * (1 - 1e-4) < testing._student(degrees, one_in) < exact * (1 + above)
    assert testing._student(1e9, 1e9) == pytest.approx(6.1094, rel=1e-4)  # the normal's


def test_neighbours_are_an_ulp_away():
    generator = torch.Generator().manual_seed(0)
    given = torch.tensor([1.0, -2.5, 0.0, math.inf, -math.inf, math.nan, 3e38, 1e-40] * 50)
    for dtype in (*DTYPES, torch.float64):
        x = given.to(dtype)
        near = testing._neighbours([x], generator)[0]
        assert near.dtype == dtype
        ends = torch.tensor([math.inf, -math.inf], dtype=dtype)
        up, down = (torch.nextafter(x.float(), end.float()) for end in ends)
        if dtype == torch.float32:
            same = (near == x) | (near == up) | (near == down) | x.isnan()
            assert same.all() and 0.2 < (near == x)[x == 1.0].float().mean() < 0.5
        unchanged = ~x.isfinite() | (x == 0)
        assert torch.equal(near[unchanged].nan_to_num(7.0), x[unchanged].nan_to_num(7.0))
        assert near[x.isfinite()].isfinite().all()
    others = [torch.arange(3), torch.tensor([True, False]), "gelu"]
    mixed = testing._neighbours([given.half(), *others, given.view(2, 4, -1)], generator)
    assert all(a is b for a, b in zip(mixed[1:4], others, strict=True))
    assert mixed[0].dtype == torch.float16 and mixed[4].shape == (2, 4, 50)


def test_what_cannot_be_judged_is_an_error():
    one = torch.randn(1)
    with pytest.raises(ValueError, match="1 values and 1 results of torch say nothing"):
        assert_within_budget(one, one.double() + 1e-6, one, "one")
    several = [one + i * 1e-7 for i in range(8)]
    assert_within_budget(one, one.double() + 1e-7, several, "one, eight times")


def test_shapes_and_infinities_must_agree():
    x = torch.randn(3, 4)
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_matches(x[:2], lambda x: x * 1.0, (x,), "shorter")
    with pytest.raises(AssertionError, match="expected 1"):
        assert_matches([x, x], lambda x: x * 1.0, (x,), "more")
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_within_budget(x, x.double()[:2], x, "baseline")
    holes = torch.where(x > 0, x, math.nan)
    with pytest.raises(AssertionError, match="not finite"):
        assert_matches(holes, lambda x: x * 1.0, (x,), "holes")
    below = torch.where(x > 0, x, -math.inf)
    above = torch.where(x > 0, x, math.inf)
    assert_matches(below, lambda x: x * 1.0, (below,), "infinite")
    with pytest.raises(AssertionError, match="infinities differ"):
        assert_matches(above, lambda x: x * 1.0, (below,), "infinite")
    assert_matches(x[:0], lambda x: x[:0] * 1.0, (x,), "nothing")


def test_gradients_of_what_is_there():
    x, w = torch.randn(2, 3), torch.randn(3)
    run = with_gradients(lambda x, w, b: x * w if b is None else x * w + b)
    out, dx, dw = run(torch.ones(2, 3), x, w, None)
    assert torch.equal(out, x * w) and torch.equal(dx, w.expand(2, 3))
    torch.testing.assert_close(dw, x.sum(0))
    assert not x.requires_grad and len(run(torch.ones(2, 3), x, w, w)) == 4


def test_memory_is_poisoned_for_results_of_kernels_alone(monkeypatch):
    allocations = "[torch.empty(3), torch.empty_like(x), x.new_empty(2), torch.empty(2).int()]"
    x = torch.zeros(2)
    of_kernels, of_others = {"__name__": "fastbert.kernels.x"}, {"__name__": "fastbert.ops.x"}
    kept = torch.empty, torch.Tensor.new_empty
    with testing.poisoned_memory():
        *made, whole = eval(allocations, of_kernels | {"torch": torch, "x": x})
        assert all(t.isnan().all() for t in made) and whole.dtype == torch.int32
        monkeypatch.setattr(torch.Tensor, "fill_", None)
        eval(allocations, of_others | {"torch": torch, "x": x})
    assert (torch.empty, torch.Tensor.new_empty) == kept
