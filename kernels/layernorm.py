"""LayerNorm over a sum: ``y = norm(dropout(x + input_bias) + residual) * weight + bias``.

Forward is one pass: x and the residual are read once, y is written once, and so is the sum z where
backward will want it, with two fp32 statistics per row, mean and ``1 / sqrt(var + eps)``. The
variance is of the centred values, in fp32 registers, so that a large common offset costs no
precision. Rows are padded to a power of two; narrow rows share a program. (Ba et al., 1607.06450.)

Backward, with ``h = (z - mean) * rstd`` and ``g = dy * weight``:

    dz = rstd * (g - mean(g) - h * mean(g * h))        dresidual = dz
    dx = dropout's factors * dz                        dinput_bias = sum(dx)
    dweight = sum(dy * h)                              dbias = sum(dy)

It reads dy and z once and writes dx, and dresidual where dropout makes it another. A bounded number
of programs walk over the rows and keep their share of the sums in registers; a second pass adds
those up. No atomics: two runs give the same bits.
"""

import torch
import triton
import triton.language as tl

from ._device import device_arch, num_sms
from ._dropout import dropout_levels, keep_values
from ._launch import launch
from ._sums import column_sums
from ._tiles import MAX_ROW, cdiv, layernorm_bwd_tile, layernorm_tile

__all__ = ["layernorm_again", "layernorm_bwd", "layernorm_fwd", "normalize"]

_PROGRAMS_PER_SM = 8  # of backward; each leaves a row of partial sums
# Both are in one tensor: where the second one starts depends on how many rows there are, which must
# not compile a kernel anew.
STATISTICS = ["mean_ptr", "rstd_ptr"]


def stages(block_n: int) -> int:
    """Steps of backward in flight: more than one where shared memory has room for them."""
    return 3 if block_n <= 2048 else 1


@triton.jit
def _affine(centred, rstd, mask_n, weight_ptr, bias_ptr, offs_n):
    """``centred * rstd * weight + bias``."""
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        y *= weight[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        y += bias[None, :]
    return y


@triton.jit
def normalize(z, mask_n, weight_ptr, bias_ptr, offs_n, eps, N: tl.constexpr):
    """LayerNorm of fp32 rows [ROWS, BLOCK_N], zero outside ``mask_n`` -> (y, mean, rstd)."""
    mean = tl.sum(z, 1) / N
    centred = tl.where(mask_n[None, :], z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / N + eps)
    return _affine(centred, rstd, mask_n, weight_ptr, bias_ptr, offs_n), mean, rstd


@triton.jit(do_not_specialize=["M", "dropout_threshold"], do_not_specialize_on_alignment=STATISTICS)
def _layernorm_fwd_kernel(
    y_ptr,  # [M, N]
    z_ptr,  # [M, N], the sum, or None
    mean_ptr, rstd_ptr,  # [M], fp32, or None
    x_ptr,  # [M, N]
    residual_ptr,  # [M, N] or None
    input_bias_ptr,  # [N] or None
    weight_ptr, bias_ptr,  # [N] or None
    seed_ptr,  # [1] int64, or None without dropout
    stride_y_m, stride_x_m, stride_residual_m,
    M,
    eps, dropout_threshold, dropout_scale,
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
    if seed_ptr is not None:
        keep = keep_values(seed_ptr, offs_m, offs_n, dropout_threshold)
        z = tl.where(keep, z * dropout_scale, 0.0)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + offs_m[:, None] * stride_residual_m + offs_n[None, :]
        z += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    y, mean, rstd = normalize(z, mask_n, weight_ptr, bias_ptr, offs_n, eps, N)
    y_ptrs = y_ptr + offs_m[:, None] * stride_y_m + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)
    if z_ptr is not None:
        z_ptrs = z_ptr + offs_m[:, None] * N + offs_n[None, :]
        tl.store(z_ptrs, z.to(z_ptr.dtype.element_ty), mask=mask)
    if mean_ptr is not None:
        tl.store(mean_ptr + offs_m, mean, mask=mask_m)
        tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=STATISTICS)
def _layernorm_again_kernel(
    y_ptr,  # [M, N]
    z_ptr,  # [M, N], contiguous
    mean_ptr, rstd_ptr,  # [M], fp32
    weight_ptr, bias_ptr,  # [N] or None
    M,
    N: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    offs = offs_m[:, None] * N + offs_n[None, :]
    z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_N]
    mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
    rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
    y = _affine(z - mean[:, None], rstd, mask_n, weight_ptr, bias_ptr, offs_n)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "dropout_threshold"], do_not_specialize_on_alignment=STATISTICS)
def _layernorm_bwd_kernel(
    dx_ptr,  # [M, N], contiguous
    dresidual_ptr,  # [M, N], contiguous, or None where dx is it
    dweight_ptr, dbias_ptr, dinput_bias_ptr,  # [programs, N], fp32, or None
    dy_ptr,  # [M, N]
    z_ptr,  # [M, N], contiguous
    mean_ptr, rstd_ptr,  # [M], fp32
    weight_ptr,  # [N] or None
    seed_ptr,  # [1] int64, or None without dropout
    stride_dy_m,
    M,
    dropout_threshold, dropout_scale,
    N: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    acc_dweight = tl.zeros([BLOCK_N], tl.float32)
    acc_dbias = tl.zeros([BLOCK_N], tl.float32)
    acc_dinput_bias = tl.zeros([BLOCK_N], tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    for block in tl.range(pid, tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
        offs_m = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        offs = offs_m[:, None] * N + offs_n[None, :]
        dy_ptrs = dy_ptr + offs_m[:, None] * stride_dy_m + offs_n[None, :]
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_N]
        z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        h = tl.where(mask, (z - mean[:, None]) * rstd[:, None], 0.0)
        g = dy
        if weight_ptr is not None:
            g = dy * weight[None, :]
        mean_g = tl.sum(g, 1) / N
        mean_gh = tl.sum(g * h, 1) / N
        dz = (g - mean_g[:, None] - h * mean_gh[:, None]) * rstd[:, None]
        dx = dz
        if seed_ptr is not None:
            keep = keep_values(seed_ptr, offs_m, offs_n, dropout_threshold)
            dx = tl.where(keep, dz * dropout_scale, 0.0)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offs, dz.to(dresidual_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dweight_ptr is not None:
            acc_dweight += tl.sum(dy * h, 0)
        if dbias_ptr is not None:
            acc_dbias += tl.sum(dy, 0)
        if dinput_bias_ptr is not None:
            acc_dinput_bias += tl.sum(tl.where(mask, dx, 0.0), 0)
    partial = pid.to(tl.int64) * N + offs_n
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, acc_dweight, mask=mask_n)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, acc_dbias, mask=mask_n)
    if dinput_bias_ptr is not None:
        tl.store(dinput_bias_ptr + partial, acc_dinput_bias, mask=mask_n)


def layernorm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    input_bias: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    keep_sum: bool = False,
    keep_statistics: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """LayerNorm of a sum.

    Args:
        x: ``[M, N]``, any row stride; N up to 8192.
        residual: ``[M, N]``, or None.
        input_bias, weight, bias: ``[N]`` or None. Dtypes may differ.
        eps: added to the variance.
        dropout_p, seed: of ``x + input_bias``; an int64 ``[1]`` if p is not 0.
        keep_sum: write the sum too.
        keep_statistics: write mean and rstd too, which backward needs beside the sum.
        out_dtype: of y, that of x if None; the sum has the wider one of x and the residual.

    Returns:
        y ``[M, N]``; z ``[M, N]`` contiguous, or None; mean and rstd of each row, fp32 ``[2, M]``,
        or None.
    """
    m, n = x.shape
    assert n <= MAX_ROW, f"rows of at most {MAX_ROW}, got {n}"
    x = x if x.stride(1) == 1 else x.contiguous()
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    y = torch.empty(m, n, dtype=out_dtype or x.dtype, device=x.device)
    z = None
    if keep_sum:
        wide = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        z = torch.empty(m, n, dtype=wide, device=x.device)
    statistics = None
    if keep_statistics:
        statistics = torch.empty(2, m, dtype=torch.float32, device=x.device)
    if y.numel() == 0:
        return y, z, statistics
    bits, threshold, scale = dropout_levels(dropout_p, coarse=False)
    tile = layernorm_tile(n, device_arch(x.device))
    launch(
        _layernorm_fwd_kernel, (cdiv(m, tile.rows),),
        y, z, *((None, None) if statistics is None else statistics.unbind()),
        x, residual, input_bias, weight, bias, seed if bits else None,
        y.stride(0), x.stride(0), 0 if residual is None else residual.stride(0), m, float(eps),
        threshold, scale,
        N=n, ROWS=tile.rows, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
    )  # fmt: skip
    return y, z, statistics


def layernorm_again(
    z: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """y from what forward kept: cheaper than keeping y as well.

    Args:
        z, statistics: from `layernorm_fwd`.
        weight, bias: as in forward.
        out_dtype: of y.

    Returns:
        y ``[M, N]``; the bits that forward gave if z is fp32.
    """
    m, n = z.shape
    y = torch.empty(m, n, dtype=out_dtype, device=z.device)
    if y.numel() == 0:
        return y
    tile = layernorm_tile(n, device_arch(z.device))
    launch(
        _layernorm_again_kernel, (cdiv(m, tile.rows),),
        y, z, *statistics.unbind(), weight, bias, m,
        N=n, ROWS=tile.rows, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
    )  # fmt: skip
    return y


def layernorm_bwd(
    dy: torch.Tensor,
    z: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    dx_dtype: torch.dtype,
    residual_dtype: torch.dtype | None = None,
    sums: tuple[bool, bool, bool] = (False, False, False),
    sums_dtype: torch.dtype = torch.float32,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Gradients of LayerNorm of a sum.

    Args:
        dy: ``[M, N]``, any row stride.
        z, statistics: from forward.
        weight: ``[N]`` or None, as in forward.
        dx_dtype: of dx.
        residual_dtype: of the residual's gradient, None where none is wanted.
        sums: whether the gradients of weight, bias and input_bias are wanted.
        sums_dtype: of these gradients.
        dropout_p, seed: as in forward.

    Returns:
        dx ``[M, N]``; the gradient of the residual where it is wanted and another than dx (with
        dropout, or in another dtype), else None; the sums that are wanted, ``[0 to 3, N]``.
    """
    m, n = dy.shape
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    bits, threshold, scale = dropout_levels(dropout_p, coarse=False)
    dx = torch.empty(m, n, dtype=dx_dtype, device=dy.device)
    dresidual = None
    if residual_dtype is not None and (bits or residual_dtype != dx_dtype):
        dresidual = torch.empty(m, n, dtype=residual_dtype, device=dy.device)
    tile = layernorm_bwd_tile(n, device_arch(dy.device))
    programs = min(cdiv(m, tile.rows), _PROGRAMS_PER_SM * num_sms(dy.device))
    shares = torch.empty(sum(sums), programs, n, dtype=torch.float32, device=dy.device)
    each = iter(shares)
    partial = [next(each) if wanted else None for wanted in sums]
    if dx.numel():
        launch(
            _layernorm_bwd_kernel, (programs,),
            dx, dresidual, *partial, dy, z, *statistics.unbind(), weight, seed if bits else None,
            dy.stride(0), m, threshold, scale,
            N=n, ROWS=tile.rows, BLOCK_N=tile.block_n, STAGES=stages(tile.block_n),
            num_warps=tile.num_warps,
        )  # fmt: skip
    totals = column_sums(shares, sums_dtype) if dx.numel() else shares.sum(1, dtype=sums_dtype)
    return dx, dresidual, totals
