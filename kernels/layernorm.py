"""LayerNorm over a sum, forward: ``y = norm(x + residual + input_bias) * weight + bias``.

One pass: x and the residual are read once, y is written once, and two fp32 statistics per row,
mean and ``1 / sqrt(var + eps)``, are kept for backward (which rebuilds the sum from its inputs).
The variance is of the centred values, in fp32 registers, so that a large common offset costs no
precision. Rows are padded to a power of two; narrow rows share a program. (Ba et al., 1607.06450.)
"""

import torch
import triton
import triton.language as tl

from ._device import device_arch, on_device
from ._tiles import MAX_ROW, layernorm_tile

__all__ = ["layernorm_fwd", "normalize"]


@triton.jit
def normalize(z, mask_n, weight_ptr, bias_ptr, offs_n, eps, N: tl.constexpr):
    """LayerNorm of fp32 rows [ROWS, BLOCK_N], zero outside ``mask_n`` -> (y, mean, rstd)."""
    mean = tl.sum(z, 1) / N
    centred = tl.where(mask_n[None, :], z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / N + eps)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        y *= weight[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        y += bias[None, :]
    return y, mean, rstd


@triton.jit(do_not_specialize=["M"])
def _layernorm_fwd_kernel(
    y_ptr,  # [M, N]
    mean_ptr, rstd_ptr,  # [M], fp32
    x_ptr,  # [M, N]
    residual_ptr,  # [M, N] or None
    input_bias_ptr,  # [N] or None
    weight_ptr, bias_ptr,  # [N] or None
    stride_y_m, stride_x_m, stride_residual_m,
    M,
    eps,
    N: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    x_ptrs = x_ptr + offs_m[:, None] * stride_x_m + offs_n[None, :]
    z = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_N]
    if input_bias_ptr is not None:
        input_bias = tl.load(input_bias_ptr + offs_n, mask=mask_n, other=0.0)
        z += input_bias.to(tl.float32)[None, :]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + offs_m[:, None] * stride_residual_m + offs_n[None, :]
        z += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    y, mean, rstd = normalize(z, mask_n, weight_ptr, bias_ptr, offs_n, eps, N)
    y_ptrs = y_ptr + offs_m[:, None] * stride_y_m + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


def layernorm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    input_bias: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LayerNorm of a sum.

    Args:
        x: ``[M, N]``, any row stride; N up to 8192.
        residual: like ``x``, or None.
        input_bias, weight, bias: ``[N]`` or None.
        eps: added to the variance.

    Returns:
        y ``[M, N]``, mean and rstd, fp32 ``[M]``.
    """
    m, n = x.shape
    assert n <= MAX_ROW, f"rows of at most {MAX_ROW}, got {n}"
    x = x if x.stride(1) == 1 else x.contiguous()
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    mean, rstd = torch.empty(2, m, dtype=torch.float32, device=x.device).unbind(0)
    if m == 0 or n == 0:
        return y, mean, rstd
    tile = layernorm_tile(n, device_arch(x.device))
    with on_device(x.device):
        _layernorm_fwd_kernel[(triton.cdiv(m, tile.rows),)](
            y, mean, rstd, x, residual, input_bias, weight, bias,
            y.stride(0), x.stride(0), 0 if residual is None else residual.stride(0), m, eps,
            N=n, ROWS=tile.rows, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
        )  # fmt: skip
    return y, mean, rstd
