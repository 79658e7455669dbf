"""How results are compared here: with fp64, and with what torch is off by on the same values.

`assert_matches` is given the specification and the arguments, and finds out by itself what torch
is off by; `assert_within_budget` is given what torch computed. Both go by one rule, and no
tolerance is set by hand:

    ``|actual - exact| <= 2 * (T + eps * max|exact|)``, plus the rounding of what is stored

**T, what torch may be off by.** The largest error of torch is one draw of luck where there are few
values, and a right result can be several times farther off. Rounding errors are modelled as
independent with mean zero, which makes the error of a sum a sum of many small independent terms
(Higham and Mary, A new approach to probabilistic rounding error analysis, SIAM J. Sci. Comput. 41,
2019). So ``m`` errors of torch with root mean square ``s`` say how far off another result of the
same quality may be: ``t * s``, t being the quantile of Student's distribution with m degrees of
freedom that one right tensor in 10^9 exceeds. T is the larger of torch's largest error and half of
that; for thousands of values the two are alike, for few values t grows. The values of a row share
errors (of a score, of a variance), so m counts rows; and where some rows stand out, m counts those.

**More than one draw.** `assert_matches` runs torch again on neighbours of the arguments, each value
moved by at most one unit in its last place: other roundings of the same problem, each compared with
fp64 on the same neighbour. (Random perturbation as a measure of rounding error: Parker, Monte Carlo
arithmetic, 1997.) It does so eight times at least, so that a row whose errors stand out is seen to,
and until m is 16, where t is twice the quantile of the normal distribution. T is never less than
torch's largest error so far, so it ends at once, with the same verdict, where that is enough. A
result that would fail is given 64 runs: s is of all rows that stand out, and what the one that
stands out among these may be off by only many draws can say. (Of 20,000 right results a thousand
rows long, row i with errors of i ** -0.5, 8 were refused after 16 runs and none after 64.)

**Stored narrower than computed.** A kernel that computes in fp32 and rounds once to 16 bit is held
to that: torch is then taken in fp32, and the result may be off by half a unit in its own last place
besides. This is sharper by the ratio of the two dtypes' eps.

**Wrong by a constant factor.** In 16 bit a factor of 1.001 hides below the rounding of every single
value, not below that of their sum. The error is read as the effect of a wrong scale of each
argument in turn (least squares); the scale found may be at most twice what it is for torch, plus
``sqrt(2 ln(2e9))`` standard errors. For independent symmetric errors that quotient is exceeded once
in 10^9, whatever their sizes (a self-normalised sum, by Hoeffding's inequality). Rows, not values,
count as independent.

`poisoned_memory` shows values that were never computed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

__all__ = ["assert_matches", "assert_within_budget", "poisoned_memory", "with_gradients"]

_FACTOR = 2.0
# A right result is called wrong once in so many comparisons.
_ONE_IN = 1e9
_DEVIATIONS = math.sqrt(2 * math.log(2 * _ONE_IN))
_ENOUGH = 16  # degrees of freedom: ever more would at best halve the quantile
_RUNS = 8  # at least: in a single one a row that stands out may happen not to
_MOST_RUNS = 64  # for what would fail
_FEWEST = 4  # below that the quantile is so large that nothing could fail
_COARSE = 2.0**-16  # eps of a dtype whose rounding may hide a factor
_STEP = 2.0**-10  # relative change of an argument's scale, for derivatives


def assert_within_budget(
    actual: Tensor,
    oracle: Tensor,
    baseline: Tensor | Sequence[Tensor],
    name: str,
    *,
    factor: float = _FACTOR,
) -> tuple[float, float]:
    """Assert that ``actual`` is as good as torch, by the rule at the top of `fastbert.testing`.

    Args:
        actual: the result under test.
        oracle: the same in fp64.
        baseline: torch's result in the dtype of ``actual``; several of them where there are few
            values, each by another order or rounding of the same computation.
        name: what is compared, for the message.
        factor: what the 2 is, for other libraries that are compared.

    Returns:
        The largest error and the budget of that value; zeros where there is nothing to compare.

    Raises:
        AssertionError: shapes differ, something is not finite that is in the oracle, or the error
            is over the budget.
        ValueError: so few values and results of torch that nothing could fail.
    """
    baselines = [baseline] if isinstance(baseline, Tensor) else list(baseline)
    for other in (actual, *baselines):
        assert other.shape == oracle.shape, (
            f"{name}: shapes differ: {tuple(actual.shape)}, oracle {tuple(oracle.shape)}, "
            f"baseline {tuple(other.shape)}"
        )
    exact = oracle.detach().double()
    errors = [_error(b, exact) for b in baselines]
    yardstick = _Yardstick.of(exact, errors, actual.dtype)
    if yardstick.degrees < _FEWEST and yardstick.off_by > 0:
        raise ValueError(
            f"{name}: {exact.numel()} values and {len(errors)} results of torch say nothing about "
            "rounding; use fastbert.testing.assert_matches, or give several baselines"
        )
    return _judge(actual, exact, yardstick, name, factor)


def assert_matches(
    actual: Tensor | Sequence[Tensor],
    specification: Callable[..., Tensor | Sequence[Tensor]],
    arguments: Sequence[Any],
    name: str,
    *,
    inside: torch.dtype | None = None,
    others: Sequence[Callable[..., Tensor | Sequence[Tensor]]] = (),
) -> None:
    """Assert that results are as good as torch's, by the rule at the top of `fastbert.testing`.

    Args:
        actual: the results under test, one or several, all for the same arguments.
        specification: what they should be, in torch operations, for floating-point arguments of any
            dtype; as many results. It is called several times and must be deterministic.
        arguments: of the specification; those that are floating-point tensors are perturbed.
        name: what is compared, for the message.
        inside: the dtype that the kernel promises to compute in, rounding once to what it stores;
            left out, torch computes in the dtype of the arguments.
        others: other ways in which torch computes the same; their errors are torch's too.

    Raises:
        AssertionError: as `assert_within_budget`, for any of the results.
    """
    results = [actual] if isinstance(actual, Tensor) else list(actual)

    def specified(
        arguments: Sequence[Any], dtype: torch.dtype | None = None, by: Callable = specification
    ) -> list[Tensor]:
        found = by(*_cast(arguments, dtype))
        return [found] if isinstance(found, Tensor) else list(found)

    exact = [t.detach() for t in specified(arguments, torch.float64)]
    if all(t.numel() == 0 for t in exact):
        _same_shapes(results, exact, name)
        return
    assert len(exact) == len(results), f"{name}: {len(results)} results, expected {len(exact)}"
    _same_shapes(results, exact, name)
    generator = torch.Generator().manual_seed(0)
    near, oracle = arguments, exact
    trial = _Trial(name, results, exact, specified, arguments)
    for run in range(1, _MOST_RUNS + 1):
        for by in (specification, *others):
            trial.add(specified(near, inside, by), oracle, inside)
        if trial.is_settled():
            return
        if run in (_RUNS, _ENOUGH, _MOST_RUNS):
            yardsticks = trial.yardsticks()
            if run >= _ENOUGH or all(y.degrees >= _ENOUGH for y in yardsticks):
                try:
                    trial.judge(yardsticks)
                    return
                except AssertionError:
                    if run == _MOST_RUNS:
                        raise
        near = _neighbours(arguments, generator)
        oracle = specified(near, torch.float64)


def with_gradients(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """``function(*tensors)`` as ``(upstream, *tensors) -> [result, gradient of each tensor]``.

    Args:
        function: of tensors; those that are None stay None and have no gradient.
    """

    def run(upstream: Tensor, *tensors: Tensor | None) -> list[Tensor]:
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        out = function(*leaves)
        given = [t for t in leaves if t is not None]
        return [out.detach(), *torch.autograd.grad(out, given, upstream.to(out.dtype))]

    return run


@dataclass(frozen=True)
class _Yardstick:
    """What torch is off by.

    Attributes:
        off_by: T, the error that torch may well make.
        degrees: how many errors of torch that rests on.
        inside: the dtype of the computation; its eps counts.
    """

    off_by: float
    degrees: float
    inside: torch.dtype

    @classmethod
    def of(cls, exact: Tensor, errors: Sequence[Tensor], inside: torch.dtype) -> _Yardstick:
        """From torch's errors on one problem and its neighbours, each like ``exact``."""
        error = torch.stack(list(errors))
        largest = error.abs().max().item() if error.numel() else 0.0
        if largest == 0.0:
            return cls(0.0, float(error.numel()), inside)
        # Errors differ in size: those that stand out decide, and count as what they are.
        variance = (error / largest).square().mean(0)
        scale = largest * (variance.square().sum() / variance.sum()).sqrt().item()
        degrees = len(errors) * _alike(_by_row(variance))
        quantile = _student(degrees, _ONE_IN * max(1.0, _alike(variance)))
        return cls(max(largest, quantile * scale / 2), degrees, inside)

    def hides_a_factor(self, stored: torch.dtype, exact: Tensor) -> bool:
        """Whether what torch is off by is comparable with the rounding of a 16-bit result."""
        eps = torch.finfo(stored).eps
        if eps < _COARSE or not self.off_by:
            return False
        return self.off_by > eps / 16 * exact.nan_to_num(0.0, 0.0, 0.0).abs().max().item()


def _student(degrees: float, one_in: float) -> float:
    """What the absolute value of Student's t exceeds once in so many.

    By Wallace's approximation (Bounds on normal approximations to Student's and the chi-square
    distributions, Ann. Math. Stat. 30, 1959): never too small, within 1 % from 16 degrees on.
    """
    z = -NormalDist().inv_cdf(0.5 / one_in)  # 1 - 0.5 / one_in may be 1
    z *= (8 * degrees + 3) / (8 * degrees + 1)
    return math.sqrt(degrees * math.expm1(min(z * z / degrees, 600.0)))


def _judge(
    actual: Tensor, exact: Tensor, yardstick: _Yardstick, name: str, factor: float
) -> tuple[float, float]:
    """Every value within its budget: the largest error and the budget there."""
    if actual.numel() == 0:
        return 0.0, 0.0
    got = actual.detach().to(exact.device, torch.float64)
    finite = exact.isfinite()
    assert torch.equal(got.isfinite(), finite), (
        f"{name}: {int((got.isfinite() != finite).sum())} of {got.numel()} values are not finite "
        "where the oracle is, or the reverse"
    )
    assert torch.equal(got[~finite].nan_to_num(), exact[~finite].nan_to_num()), (
        f"{name}: infinities differ"
    )
    got, exact = got[finite], exact[finite]
    if got.numel() == 0:
        return 0.0, 0.0
    error = (got - exact).abs()
    rounding = torch.finfo(yardstick.inside).eps * exact.abs().max().item()
    budget = torch.full_like(error, factor * (yardstick.off_by + rounding))
    if torch.finfo(actual.dtype).eps > torch.finfo(yardstick.inside).eps:
        budget += _half_spacing(exact.abs() + budget, actual.dtype)
    worst = int((error - budget).argmax())
    assert error[worst] <= budget[worst], (
        f"{name}: error {error[worst]:.3e} is over the budget {budget[worst]:.3e} "
        f"({int((error > budget).sum())} of {error.numel()} values; worst: got {got[worst]:.6g}, "
        f"exact {exact[worst]:.6g}; torch in {yardstick.inside} may be off by "
        f"{yardstick.off_by:.2e})"
    )
    largest = int(error.argmax())
    return error[largest].item(), budget[largest].item()


class _Trial:
    """Results against what they should be, as torch's errors come in.

    Args:
        name: what is compared, for messages.
        results: those under test.
        exact: the same in fp64.
        specified: arguments -> the same by torch, in the dtypes of the arguments.
        arguments: of that.
    """

    def __init__(
        self,
        name: str,
        results: Sequence[Tensor],
        exact: Sequence[Tensor],
        specified: Callable[[Sequence[Any]], list[Tensor]],
        arguments: Sequence[Any],
    ):
        self._name, self._results, self._exact = name, results, exact
        self._specified, self._arguments = specified, arguments
        self._errors: list[list[Tensor]] = [[] for _ in exact]  # torch's, of each result
        self._inside: list[torch.dtype] = []  # what each is computed in

    def add(
        self, torchs: Sequence[Tensor], oracle: Sequence[Tensor], inside: torch.dtype | None
    ) -> None:
        """Torch's results for a problem near this one, its exact ones, and the dtype in which torch
        computed, None for that of each result."""
        for errors, found, exact in zip(self._errors, torchs, oracle, strict=True):
            errors.append(_error(found, exact))
        self._inside = [inside or t.dtype for t in torchs]

    def yardsticks(self) -> list[_Yardstick]:
        return [*map(_Yardstick.of, self._exact, self._errors, self._inside)]

    def is_settled(self) -> bool:
        """Whether the results pass by these errors of torch alone, and so by any more besides.

        T is never less than the largest of them, nor is the limit of a scale; whether a factor
        hides is not known yet, so every 16-bit result is looked at.
        """
        try:
            for result, exact, errors, inside in zip(
                self._results, self._exact, self._errors, self._inside, strict=True
            ):
                largest = max((e.abs().max().item() for e in errors if e.numel()), default=0.0)
                yardstick = _Yardstick(largest, float(len(errors)), inside)
                _judge(result, exact, yardstick, "", _FACTOR)
            coarse = [i for i, r in enumerate(self._results) if torch.finfo(r.dtype).eps >= _COARSE]
            if coarse and sum(map(_is_floating, self._arguments)) > _ENOUGH:
                return False  # a scale of each is more work than more errors
            self._judge_scales(coarse)
        except AssertionError:
            return False
        return True

    def judge(self, yardsticks: Sequence[_Yardstick]) -> None:
        """The verdict: every value, and where a factor may hide behind rounding, every scale."""
        hidden = []
        for i, yardstick in enumerate(yardsticks):
            result, exact = self._results[i], self._exact[i]
            label = self._name if len(self._results) == 1 else f"{self._name}, result {i}"
            _judge(result, exact, yardstick, label, _FACTOR)
            if yardstick.hides_a_factor(result.dtype, exact):
                hidden.append(i)
        self._judge_scales(hidden)

    def _judge_scales(self, which: Sequence[int]) -> None:
        """No argument's scale explains the errors; of the results with these numbers.

        A sum of n terms is at most sqrt(n) times the root of the sum of their squares, so that
        fewer rows than ``_DEVIATIONS ** 2`` cannot be over the limit.
        """
        which = [i for i in which if _by_row(self._exact[i]).numel() > _DEVIATIONS**2]
        if not which:
            return
        wide = _cast(self._arguments, torch.float64)
        for at, argument in enumerate(wide):
            if not _is_floating(argument):
                continue
            moved = self._specified([*wide[:at], argument * (1 + _STEP), *wide[at + 1 :]])
            for i in which:
                exact = self._exact[i]
                effect = (moved[i].detach() - exact).nan_to_num(0.0, 0.0, 0.0) / _STEP
                power = effect.square().sum()
                if power == 0:
                    continue
                own = _error(self._results[i], exact)
                parts = [_by_row(e * effect) / power for e in (own, *self._errors[i])]
                found, *torchs = (p.sum().abs().item() for p in parts)
                uncertain = _DEVIATIONS * parts[0].square().sum().sqrt().item()
                limit = _FACTOR * (max(torchs) + torch.finfo(torch.float32).eps) + uncertain
                assert found <= limit, (
                    f"{self._name}, result {i}: off as if argument {at} were scaled by 1 +- "
                    f"{found:.2e}; within rounding would be {limit:.2e}"
                )


def _alike(variances: Tensor) -> float:
    """How many equal ones have the same sum and the same sum of squares."""
    return (variances.sum().square() / variances.square().sum()).item()


def _by_row(values: Tensor) -> Tensor:
    return values.sum(-1) if values.dim() > 1 else values


def _error(result: Tensor, exact: Tensor) -> Tensor:
    """In fp64; zero where there is no finite value to compare with."""
    return (result.detach().to(exact.device, torch.float64) - exact).nan_to_num(0.0, 0.0, 0.0)


def _half_spacing(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance of the values of a dtype around these."""
    facts = torch.finfo(dtype)
    _, exponent = torch.frexp(magnitude.clamp_min(facts.tiny))  # in [2^(e-1), 2^e)
    return torch.ldexp(torch.full_like(magnitude, facts.eps / 2), exponent - 1)


def _is_floating(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def _cast(arguments: Sequence[Any], dtype: torch.dtype | None) -> list[Any]:
    if dtype is None:
        return list(arguments)
    return [a.to(dtype) if _is_floating(a) else a for a in arguments]


def _neighbours(arguments: Sequence[Any], generator: torch.Generator) -> list[Any]:
    """Each value of a tensor moved down, up or not at all, by one unit in its last place.

    Zeros and what is not finite stay, and so do ids and masks. The tensors of a dtype and device
    are moved as one: a model has a hundred small ones.
    """
    near = list(arguments)
    alike: dict[tuple, list[int]] = {}
    for i, a in enumerate(arguments):
        if _is_floating(a):
            alike.setdefault((a.dtype, a.device), []).append(i)
    for places in alike.values():
        given = torch.cat([arguments[i].detach().flatten() for i in places])
        bits = given.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[given.itemsize])
        step = torch.randint(-1, 2, bits.shape, generator=generator, dtype=torch.int8)
        moved = (bits + step.to(bits)).view(given.dtype)
        moved = torch.where((given != 0) & given.isfinite() & moved.isfinite(), moved, given)
        for i, part in zip(
            places, moved.split([arguments[i].numel() for i in places]), strict=True
        ):
            near[i] = part.view(arguments[i].shape)
    return near


def _same_shapes(results: Sequence[Tensor], exact: Sequence[Tensor], name: str) -> None:
    shapes = [[tuple(t.shape) for t in ts] for ts in (results, exact)]
    assert shapes[0] == shapes[1], f"{name}: shapes differ: {shapes[0]}, expected {shapes[1]}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, results of kernels are allocated as NaN, so that a value that none writes shows."""
    owners = {"empty": torch, "empty_like": torch, "empty_strided": torch, "new_empty": Tensor}
    before = {name: getattr(owner, name) for name, owner in owners.items()}

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_and_fill(*args, **kwargs):
            out = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            ours = caller.startswith(("fastbert.kernels.", "fastbert.ops.repeated"))
            # More is memory that is left untouched.
            if ours and out.is_floating_point() and out.numel() < 2**26:
                out.fill_(float("nan"))
            return out

        return allocate_and_fill

    for name, owner in owners.items():
        setattr(owner, name, poisoned(before[name]))
    try:
        yield
    finally:
        for name, owner in owners.items():
            setattr(owner, name, before[name])
