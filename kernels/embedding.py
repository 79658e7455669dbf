"""BERT's embeddings: three gathered rows, their sum and its LayerNorm, in one pass.

``y[t] = norm(word[token_ids[t]] + token_type[token_type_ids[t]] + position[position_ids[t]])``.
Reads one row of each table per token and writes one; the sum, mean and rstd, fp32 ``[T]``, are kept
where there will be a backward, which is LayerNorm's and then torch's sum of rows by id. An id
outside its table reads nothing and makes its row NaN: looking at ids on the host would cost a
synchronisation, and reading past a table would not be noticed at all.
"""

import torch
import triton
import triton.language as tl

from ._device import device_arch
from ._launch import launch
from ._tiles import MAX_ROW, cdiv, layernorm_tile
from .layernorm import STATISTICS, normalize

__all__ = ["embedding_fwd"]


@triton.jit
def _gather(table_ptr, ids_ptr, num_rows, offs_m, mask_m, offs_n, mask_n, stride_table_row):
    """Rows of a table in fp32, [ROWS, BLOCK_N]; NaN for an id that is not in it."""
    ids = tl.load(ids_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    valid = (ids >= 0) & (ids < num_rows)
    rows = table_ptr + ids[:, None] * stride_table_row + offs_n[None, :]
    mask = (mask_m & valid)[:, None] & mask_n[None, :]
    values = tl.load(rows, mask=mask, other=0.0).to(tl.float32)
    return tl.where(valid[:, None], values, float("nan"))


@triton.jit(
    do_not_specialize=["M", "num_words", "num_positions", "num_types"],
    do_not_specialize_on_alignment=[
        *STATISTICS, "token_ids_ptr", "position_ids_ptr", "token_type_ids_ptr",
    ],
)  # fmt: skip
def _embedding_fwd_kernel(
    y_ptr,  # [M, N]
    z_ptr,  # [M, N], the sum, or None, as mean and rstd are then
    mean_ptr, rstd_ptr,  # [M], fp32, or None
    token_ids_ptr, position_ids_ptr,  # [M]
    token_type_ids_ptr,  # [M] or None
    word_ptr, position_ptr,  # [rows, N]
    token_type_ptr,  # [rows, N] or None
    weight_ptr, bias_ptr,  # [N]
    stride_y_m, stride_word_row, stride_position_row, stride_token_type_row,
    M, num_words, num_positions, num_types,
    eps,
    N: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    z = _gather(word_ptr, token_ids_ptr, num_words, offs_m, mask_m, offs_n, mask_n, stride_word_row)
    if token_type_ptr is not None:
        z += _gather(
            token_type_ptr, token_type_ids_ptr, num_types, offs_m, mask_m, offs_n, mask_n,
            stride_token_type_row,
        )  # fmt: skip
    z += _gather(
        position_ptr, position_ids_ptr, num_positions, offs_m, mask_m, offs_n, mask_n,
        stride_position_row,
    )  # fmt: skip
    z = tl.where(mask_n[None, :], z, 0.0)
    y, mean, rstd = normalize(z, mask_n, weight_ptr, bias_ptr, offs_n, eps, N)
    y_ptrs = y_ptr + offs_m[:, None] * stride_y_m + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)
    if z_ptr is not None:
        z_ptrs = z_ptr + offs_m[:, None] * N + offs_n[None, :]
        tl.store(z_ptrs, z.to(z_ptr.dtype.element_ty), mask=mask)
        tl.store(mean_ptr + offs_m, mean, mask=mask_m)
        tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


def embedding_fwd(
    token_ids: torch.Tensor,
    position_ids: torch.Tensor,
    token_type_ids: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor,
    token_type: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
    keep_sum: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Embeddings of packed ids.

    Args:
        token_ids, position_ids, token_type_ids: int32 or int64 ``[T]``; the last may be None.
        word, position, token_type: tables ``[rows, E]``, E up to 8192; the last may be None.
        weight, bias: ``[E]`` of the LayerNorm, or None.
        eps: added to the variance.
        keep_sum: write the sum and its statistics too, for backward.
        out_dtype: of y, that of the tables if None.

    Returns:
        y ``[T, E]``; z ``[T, E]`` or None; mean and rstd of each row, fp32 ``[2, T]``, or None.
    """
    m, n = token_ids.shape[0], word.shape[1]
    assert n <= MAX_ROW, f"rows of at most {MAX_ROW}, got {n}"
    assert (token_type_ids is None) == (token_type is None)
    tables = [t if t is None or t.stride(1) == 1 else t.contiguous() for t in
              (word, position, token_type)]  # fmt: skip
    ids = [t if t is None else t.contiguous() for t in (token_ids, position_ids, token_type_ids)]
    y = torch.empty(m, n, dtype=out_dtype or word.dtype, device=word.device)
    z = statistics = None
    if keep_sum:
        z = torch.empty(m, n, dtype=word.dtype, device=word.device)
        statistics = torch.empty(2, m, dtype=torch.float32, device=word.device)
    if m == 0:
        return y, z, statistics
    tile = layernorm_tile(n, device_arch(word.device))
    launch(
        _embedding_fwd_kernel, (cdiv(m, tile.rows),),
        y, z, *((None, None) if statistics is None else statistics.unbind()), *ids, *tables,
        weight, bias, y.stride(0), *(0 if t is None else t.stride(0) for t in tables),
        m, *(0 if t is None else t.shape[0] for t in tables), float(eps),
        N=n, ROWS=tile.rows, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
    )  # fmt: skip
    return y, z, statistics
