"""Randomised parity: a kernel against its reference over shapes, dtypes, strides and masks.

The cases are those of `fastbert.workbench.cases`, so that a failure can be printed, made smaller,
and run again. Kernels run on a GPU, or through Triton's interpreter.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..ops.backend import backend
from ..testing import assert_matches
from .cases import DTYPES, FUZZERS, Case

__all__ = ["DTYPES", "FUZZERS", "Failure", "check", "run_case"]

# Simpler cases tried for a failing one.
_TRIES = 300


@dataclass(frozen=True)
class Failure:
    """The smallest case found that fails, and how; the one that it was made of, too."""

    kernel: str
    case: Case
    error: str
    cases_run: int
    drawn: Case


def run_case(kernel: str, case: Case, device: str) -> None:
    """Run one case.

    Raises:
        AssertionError: over the budget of `fastbert.testing.assert_matches`.
        Exception: whatever the kernel raises.
    """
    torch.manual_seed(case["seed"])
    with backend("triton"):
        results = FUZZERS[kernel].run(case, device)
    for name, result in results.items():
        assert_matches(
            result.actual,
            result.specification,
            result.arguments,
            name,
            inside=result.inside,
            others=result.others,
        )


def check(
    kernel: str,
    *,
    device: str,
    cases: int | None = None,
    seconds: float | None = None,
    dtypes: Sequence[str] = tuple(DTYPES),
    only: Case | None = None,
    seed: int = 0,
    shrink: bool = True,
) -> Failure | int:
    """Run random cases until one fails; a failing one is made smaller.

    Args:
        cases: how many; the same for the same seed.
        seconds: or for how long, and at least one.
        dtypes: keys of `DTYPES`.
        only: what cases have to have, by name; others are drawn, but not run.
        shrink: whether to make a failing case smaller.

    Returns:
        A `Failure`, or how many cases passed.
    """
    if (cases is None) == (seconds is None):
        raise ValueError(f"expected cases or seconds, got {cases=} and {seconds=}")
    known = FUZZERS[kernel].draw(random.Random(seed), next(iter(dtypes)))
    if only is not None and only.keys() - known.keys():
        raise ValueError(f"expected only of {', '.join(known)}, got {', '.join(only)}")
    generator = random.Random(seed)
    end, count = time.monotonic() + (seconds or 0.0), 0
    while count == 0 or (time.monotonic() < end if cases is None else count < cases):
        dtype = generator.choice(list(dtypes))
        case = {**FUZZERS[kernel].draw(generator, dtype), "dtype": dtype}
        case["seed"] = generator.randrange(2**31)
        if only is not None and not only.items() <= case.items():
            continue
        count += 1
        error = _error(kernel, case, device)
        if error is not None:
            found = _shrink(kernel, case, error, device) if shrink else (case, error)
            return Failure(kernel, *found, count, drawn=case)
    return count


def _error(kernel: str, case: Case, device: str) -> str | None:
    try:
        run_case(kernel, case, device)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def _smaller(kernel: str, case: Case) -> Iterator[Case]:
    """Cases one step simpler: flags off, numbers smaller."""
    for key, value in case.items():
        if key in ("seed", "dtype"):
            continue
        if value is True:
            yield {**case, key: False}
        elif isinstance(value, int) and not isinstance(value, bool):
            least = FUZZERS[kernel].least.get(key, 1)
            for fewer in dict.fromkeys((least, value // 2, value - 1)):
                if least <= fewer < value:
                    yield {**case, key: fewer}
        elif isinstance(value, list):
            for i in range(len(value)):
                if len(value) > 1:
                    yield {**case, key: value[:i] + value[i + 1 :]}
                least = FUZZERS[kernel].least.get(key, 0)
                for fewer in dict.fromkeys((least, value[i] // 2, value[i] - 1)):
                    if least <= fewer < value[i]:
                        yield {**case, key: [*value[:i], fewer, *value[i + 1 :]]}


def _shrink(kernel: str, case: Case, error: str, device: str) -> tuple[Case, str]:
    """Steps to a simpler failing case until no step fails any more, or enough were tried."""
    tried = 0
    progress = True
    while progress:
        progress = False
        for candidate in filter(FUZZERS[kernel].makes_sense, _smaller(kernel, case)):
            tried += 1
            if tried > _TRIES:
                return case, error
            found = _error(kernel, candidate, device)
            if found is not None:
                case, error, progress = candidate, found, True
                break
    return case, error
