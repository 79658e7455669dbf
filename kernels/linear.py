"""Linear layers with an activation: ``y = act(x w^T + bias)``.

Two ways to the same result; `fastbert.kernels._tiles.linear_route` says which one runs.
`_linear_fwd_kernel` is a product whose epilogue adds the bias and applies the activation before
anything is stored: it saves the pass over ``[M, N]`` and has to come within that pass of the
library's speed. It is persistent: a grid of at most a few programs per SM, each walking over output
tiles, so that the epilogue of one tile overlaps with the loads of another program's next.
`_bias_activation_fwd_kernel` is that pass, in place, behind the library's product. Sums are fp32.

For training the activation is a pass of its own, from the pre-activation, which is kept. Backward
reads that once for the derivative, for the result itself where the next product needs it again, and
adds up the bias gradient in the same pass: a bounded number of programs walk over the rows, a
second pass adds up what each found, nothing is atomic.
"""

import torch
import triton
import triton.language as tl

from ._common import ACTIVATIONS, activate, activation_slope
from ._device import device_arch, input_precision, num_sms
from ._launch import launch
from ._sums import column_sums
from ._tiles import bias_activation_tile, cdiv, gemm_tile

__all__ = [
    "activation_bwd",
    "activation_fwd",
    "bias_activation_fwd_",
    "linear_activation_fwd",
]

_PROGRAMS_PER_SM = 2


@triton.jit(do_not_specialize=["M"])
def _linear_fwd_kernel(
    y_ptr,  # [M, N]
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    bias_ptr,  # [N] or None
    stride_y_m, stride_x_m, stride_w_n,
    M,
    N: tl.constexpr, K: tl.constexpr,
    ACTIVATION: tl.constexpr, SHORT_ERF: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    per_group: tl.constexpr = GROUP_M * tiles_n
    offs_k = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        # GROUP_M row tiles go over the columns together, so that the weight is read from cache.
        first_m = tile // per_group * GROUP_M
        group = tl.minimum(tiles_m - first_m, GROUP_M)
        tile_m = first_m + tile % per_group % group
        tile_n = tile % per_group // group
        offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_m = offs_m < M
        mask_n = offs_n < N
        x_ptrs = x_ptr + offs_m[:, None] * stride_x_m + offs_k[None, :]
        w_ptrs = w_ptr + offs_n.to(tl.int64)[:, None] * stride_w_n + offs_k[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, K, BLOCK_K):
            if K % BLOCK_K == 0:
                x = tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)  # [BLOCK_M, BLOCK_K]
                w = tl.load(w_ptrs, mask=mask_n[:, None], other=0.0)  # [BLOCK_N, BLOCK_K]
            else:
                mask_k = start + offs_k < K
                x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
                w = tl.load(w_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
            acc = tl.dot(x, tl.trans(w), acc, input_precision=INPUT_PRECISION)
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            acc += bias[None, :]
        y = activate(acc, ACTIVATION, SHORT_ERF).to(y_ptr.dtype.element_ty)
        y_ptrs = y_ptr + offs_m[:, None] * stride_y_m + offs_n[None, :]
        tl.store(y_ptrs, y, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["M"])
def _bias_activation_fwd_kernel(
    y_ptr,  # [M, N]; x itself for in place
    x_ptr,  # [M, N]
    bias_ptr,  # [N] or None
    stride_y_m, stride_x_m,
    M,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr, SHORT_ERF: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    x_ptrs = x_ptr + offs_m[:, None] * stride_x_m + offs_n[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_N]
    if bias_ptr is not None:
        x += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * stride_y_m + offs_n[None, :]
    tl.store(y_ptrs, activate(x, ACTIVATION, SHORT_ERF).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _activation_bwd_kernel(
    dx_ptr,  # [M, N], contiguous
    y_ptr,  # [M, N], contiguous: the activation once more, or None
    dbias_ptr,  # [programs, N], fp32, or None
    dy_ptr,  # [M, N]
    x_ptr,  # [M, N], contiguous: the pre-activation
    stride_dy_m,
    M,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr, SHORT_ERF: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    acc = tl.zeros([BLOCK_N], tl.float32)
    for block in range(pid, tl.cdiv(M, ROWS), tl.num_programs(0)):
        offs_m = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        offs = offs_m[:, None] * N + offs_n[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_N]
        dy_ptrs = dy_ptr + offs_m[:, None] * stride_dy_m + offs_n[None, :]
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        dx = dy * activation_slope(x, ACTIVATION, SHORT_ERF)
        if y_ptr is not None:
            y = activate(x, ACTIVATION, SHORT_ERF)
            tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dbias_ptr is not None:
            acc += tl.sum(dx, 0)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + pid.to(tl.int64) * N + offs_n, acc, mask=mask_n)


def linear_activation_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, activation: str
) -> torch.Tensor:
    """``act(x @ weight.T + bias)`` in one kernel.

    Args:
        x: ``[M, K]``, any row stride.
        weight: ``[N, K]``, any row stride.
        bias: ``[N]`` or None.
        activation: one of `fastbert.kernels._common.ACTIVATIONS`.

    Returns:
        ``[M, N]`` contiguous.
    """
    assert activation in ACTIVATIONS, activation
    (m, k), n = x.shape, weight.shape[0]
    x, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (x, weight))
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    tile = gemm_tile(m=m, dtype=x.dtype, arch=device_arch(x.device))
    tiles = cdiv(m, tile.block_m) * cdiv(n, tile.block_n)
    launch(
        _linear_fwd_kernel, (min(tiles, _PROGRAMS_PER_SM * num_sms(x.device)),),
        y, x, weight, bias, y.stride(0), x.stride(0), weight.stride(0), m,
        N=n, K=k, ACTIVATION=activation, SHORT_ERF=x.dtype.itemsize == 2,
        INPUT_PRECISION=input_precision(x.dtype),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.max_registers,
    )  # fmt: skip
    return y


def bias_activation_fwd_(
    x: torch.Tensor, bias: torch.Tensor | None, *, activation: str
) -> torch.Tensor:
    """``x = act(x + bias)`` in place.

    Args:
        x: ``[M, N]``, any row stride.
        bias: ``[N]`` or None.
        activation: one of `fastbert.kernels._common.ACTIVATIONS`.

    Returns:
        ``x``.
    """
    assert activation in ACTIVATIONS, activation
    assert x.stride(1) == 1, "in place: rows must be contiguous"
    m, n = x.shape
    if x.numel() == 0:
        return x
    tile = bias_activation_tile(n, device_arch(x.device))
    launch(
        _bias_activation_fwd_kernel, (cdiv(m, tile.rows), cdiv(n, tile.block_n)),
        x, x, bias, x.stride(0), x.stride(0), m,
        N=n, ACTIVATION=activation, SHORT_ERF=x.dtype.itemsize == 2,
        ROWS=tile.rows, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
    )  # fmt: skip
    return x


def activation_fwd(x: torch.Tensor, *, activation: str) -> torch.Tensor:
    """``act(x)`` as a new tensor, for training.

    Args:
        x: ``[M, N]``, contiguous.
        activation: one of `fastbert.kernels._common.ACTIVATIONS`.

    Returns:
        Like ``x``.
    """
    assert activation in ACTIVATIONS, activation
    m, n = x.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    tile = bias_activation_tile(n, device_arch(x.device))
    launch(
        _bias_activation_fwd_kernel, (cdiv(m, tile.rows), cdiv(n, tile.block_n)),
        y, x, None, n, n, m,
        N=n, ACTIVATION=activation, SHORT_ERF=x.dtype.itemsize == 2,
        ROWS=tile.rows, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
    )  # fmt: skip
    return y


def activation_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    *,
    activation: str,
    bias_dtype: torch.dtype | None = None,
    again: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradient of an activation, its result once more, and the sum over rows, in one pass.

    Args:
        dy: ``[M, N]``, any row stride.
        x: ``[M, N]``, contiguous, the pre-activation.
        activation: one of `fastbert.kernels._common.ACTIVATIONS`.
        bias_dtype: of the sum of the gradient over rows, None where it is not wanted.
        again: whether ``act(x)`` is wanted.

    Returns:
        The gradient of ``x``; ``act(x)`` or None; the sum ``[N]`` or None.
    """
    assert activation in ACTIVATIONS, activation
    m, n = x.shape
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    dx = torch.empty(m, n, dtype=x.dtype, device=x.device)
    y = torch.empty_like(dx) if again else None
    tile = bias_activation_tile(n, device_arch(x.device))
    programs = min(cdiv(m, tile.rows), _PROGRAMS_PER_SM * num_sms(x.device))
    dbias = None
    if bias_dtype is not None:
        dbias = torch.empty(1, programs, n, dtype=torch.float32, device=x.device)
    if dx.numel():
        launch(
            _activation_bwd_kernel, (programs, cdiv(n, tile.block_n)),
            dx, y, dbias, dy, x, dy.stride(0), m,
            N=n, ACTIVATION=activation, SHORT_ERF=x.dtype.itemsize == 2,
            ROWS=tile.rows, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
        )  # fmt: skip
    if dbias is not None:
        empty = dx.numel() == 0
        dbias = (dbias.sum(1, dtype=bias_dtype) if empty else column_sums(dbias, bias_dtype))[0]
    return dx, y, dbias
