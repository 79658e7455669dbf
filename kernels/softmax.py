"""Row softmax with a scale and a mask: ``y = softmax(x * scale + mask)``.

A whole row, up to 8192 values, is in registers: x is read once and y written once. Short rows
share a program. The mask is bool (kept where True) or floating (added); it is read with its own
strides, so that a mask per key or per head is broadcast without being stored. A row with nothing
left gives zeros. Backward needs y alone: ``dx = scale * y * (dy - sum(dy * y))``, and the same
without the scale for the mask.
"""

import torch
import triton
import triton.language as tl

from ._common import LOG2E
from ._device import device_arch
from ._launch import launch
from ._tiles import MAX_ROW, cdiv, softmax_tile

__all__ = ["softmax_bwd", "softmax_fwd"]


@triton.jit(do_not_specialize=["M", "num_heads", "num_queries"])
def _softmax_fwd_kernel(
    y_ptr,  # [M, N], contiguous; M = B * H * Q
    x_ptr,  # [B, H, Q, N] by strides
    mask_ptr,  # [B, H, Q, N] by strides, uint8 or floating, or None
    stride_x_b, stride_x_h, stride_x_q,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_n,
    M, num_heads, num_queries, N,
    scale,
    IS_BOOL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    query = (row % num_queries).to(tl.int64)
    head = (row // num_queries % num_heads).to(tl.int64)
    sequence = (row // num_queries // num_heads).to(tl.int64)
    offs_m = row.to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    x_rows = sequence * stride_x_b + head * stride_x_h + query * stride_x_q
    x = tl.load(x_ptr + x_rows[:, None] + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    s = x * scale  # [ROWS, BLOCK_N]
    if mask_ptr is not None:
        mask_rows = sequence * stride_mask_b + head * stride_mask_h + query * stride_mask_q
        offs_mask = mask_rows[:, None] + offs_n.to(tl.int64)[None, :] * stride_mask_n
        given = tl.load(mask_ptr + offs_mask, mask=mask, other=0)
        if IS_BOOL:
            s = tl.where(given != 0, s, float("-inf"))
        else:
            s += given.to(tl.float32)
    s = tl.where(mask_n[None, :], s, float("-inf"))
    top = tl.max(s, 1)
    # To units of log2 after the difference, which is exact near the top, where p is large.
    p = tl.exp2((s - tl.where(top == float("-inf"), 0.0, top)[:, None]) * LOG2E)
    total = tl.sum(p, 1)
    y = p / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _softmax_bwd_kernel(
    dx_ptr,  # [M, N], contiguous
    dy_ptr, y_ptr,  # [M, N], contiguous
    M, N,
    scale,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_n = tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    offs = offs_m[:, None] * N + offs_n[None, :]
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_N]
    y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dx = scale * y * (dy - tl.sum(dy * y, 1)[:, None])
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def softmax_fwd(x: torch.Tensor, mask: torch.Tensor | None, *, scale: float) -> torch.Tensor:
    """Softmax over the last dimension.

    Args:
        x: ``[B, H, Q, N]``, any strides, the last 1; N up to 8192.
        mask: bool or floating, expanded to the shape of ``x``, or None.
        scale: factor for ``x``.

    Returns:
        Like ``x``, contiguous.
    """
    batch_size, num_heads, num_queries, n = x.shape
    assert n <= MAX_ROW, f"rows of at most {MAX_ROW}, got {n}"
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    is_bool = mask is not None and mask.dtype == torch.bool
    m = batch_size * num_heads * num_queries
    assert m < 2**31, f"at most 2**31 rows, got {m}"
    tile = softmax_tile(n, device_arch(x.device))
    launch(
        _softmax_fwd_kernel, (cdiv(m, tile.rows),),
        y, x, mask,
        *x.stride()[:3], *((0, 0, 0, 0) if mask is None else mask.stride()),
        m, num_heads, num_queries, n, float(scale),
        IS_BOOL=is_bool, ROWS=tile.rows, BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return y


def softmax_bwd(dy: torch.Tensor, y: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Gradient of softmax's input.

    Args:
        dy: like ``y``.
        y: ``[..., N]`` from forward, contiguous.
        scale: as in forward; 1 gives the gradient of the mask.

    Returns:
        Like ``y``.
    """
    dy = dy.contiguous()
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if dx.numel() == 0:
        return dx
    n = y.shape[-1]
    m = y.numel() // n
    tile = softmax_tile(n, device_arch(y.device))
    launch(
        _softmax_bwd_kernel, (cdiv(m, tile.rows),),
        dx, dy, y, m, n, float(scale),
        ROWS=tile.rows, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
    )  # fmt: skip
    return dx
