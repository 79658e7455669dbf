"""The last step of sums over rows: what each program of a backward kernel has added up, in total.

Gradients of a bias or of a norm's weight are sums over all rows. Atomics would add them in another
order each time; here each program leaves its share, and one launch adds the shares of all sums in
a fixed order.
"""

import torch
import triton
import triton.language as tl

from ._launch import launch
from ._tiles import cdiv

__all__ = ["column_sums"]

ROWS, BLOCK_N = 64, 16


@triton.jit(do_not_specialize=["P"])
def _column_sums_kernel(
    out_ptr,  # [K, N]
    shares_ptr,  # [K, P, N], fp32
    P,
    N: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in range(0, P, ROWS):
        offs_p = start + tl.arange(0, ROWS)
        ptrs = shares_ptr + (which * P + offs_p)[:, None] * N + offs_n[None, :]
        acc += tl.load(ptrs, mask=(offs_p < P)[:, None] & mask_n[None, :], other=0.0)
    total = tl.sum(acc, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + which * N + offs_n, total, mask=mask_n)


def column_sums(shares: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``shares.sum(1)``, added up in fp32.

    Args:
        shares: fp32 ``[K, P, N]``, contiguous.
        dtype: of the result.

    Returns:
        ``[K, N]``.
    """
    k, p, n = shares.shape
    out = torch.empty(k, n, dtype=dtype, device=shares.device)
    if out.numel():
        launch(
            _column_sums_kernel, (cdiv(n, BLOCK_N), k), out, shares, p,
            N=n, ROWS=ROWS, BLOCK_N=BLOCK_N, num_warps=4,
        )  # fmt: skip
    return out
