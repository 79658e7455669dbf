"""How results are compared here: with fp64, and with what torch manages in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_within_budget"]


def assert_within_budget(
    actual: Tensor, oracle: Tensor, baseline: Tensor, name: str, *, factor: float = 2
) -> tuple[float, float]:
    """Assert that ``actual`` is as good as torch: at most twice its error plus one rounding.

    ``|actual - oracle| <= 2 * (|baseline - oracle| + eps * max|oracle|)`` in the largest absolute
    error, eps being that of ``actual``'s dtype. The budget follows from the inputs; nothing is
    chosen by hand. (FlashAttention's tests have used the idea since its first version.)

    Args:
        actual: the result under test.
        oracle: the same in fp64.
        baseline: torch's result in the dtype of ``actual``.
        name: what is compared, for the message.
        factor: what the 2 is, for other libraries that are compared.

    Returns:
        The largest error and the budget; zeros where there is nothing to compare.

    Raises:
        AssertionError: shapes differ, something is not finite that is in the oracle, or the error
            is over the budget.
    """
    assert actual.shape == oracle.shape == baseline.shape, (
        f"{name}: shapes differ: {tuple(actual.shape)}, oracle {tuple(oracle.shape)}, "
        f"baseline {tuple(baseline.shape)}"
    )
    if actual.numel() == 0:
        return 0.0, 0.0
    got, exact, torchs = (
        t.detach().to(oracle.device, torch.float64) for t in (actual, oracle, baseline)
    )
    finite = exact.isfinite()
    assert torch.equal(got.isfinite(), finite), (
        f"{name}: {int((got.isfinite() != finite).sum())} of {got.numel()} values are not finite "
        "where the oracle is, or the reverse"
    )
    assert torch.equal(got[~finite].nan_to_num(), exact[~finite].nan_to_num()), (
        f"{name}: infinities differ"
    )
    got, exact, torchs = got[finite], exact[finite], torchs[finite]
    if got.numel() == 0:
        return 0.0, 0.0
    error = (got - exact).abs()
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    budget = factor * ((torchs - exact).abs().max().item() + rounding)
    worst = int(error.argmax())
    assert error[worst] <= budget, (
        f"{name}: error {error[worst]:.3e} is over the budget {budget:.3e} "
        f"({int((error > budget).sum())} of {error.numel()} values; worst: got {got[worst]:.6g}, "
        f"exact {exact[worst]:.6g}, torch in {actual.dtype} {torchs[worst]:.6g})"
    )
    return error[worst].item(), budget
