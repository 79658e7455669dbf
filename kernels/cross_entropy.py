"""Cross-entropy over the rows of a product, in place: logits in, losses and their gradients out.

``loss = lse - (1 - smoothing) * x[label] - smoothing * mean(x)``, with ``lse = logsumexp(x)`` and
``x`` the logits with their bias. Two passes over a row, which for BERT's vocabulary stays in cache
between them: the first finds the log-sum-exp online (Milakov and Gimelshein, 1805.02867), the
second overwrites the logits with ``softmax(x) - (1 - smoothing) * onehot - smoothing / V``. No
tensor of the size of the logits is made beside them, and backward has nothing to read again (the
idea of Liger-Kernel, 2410.10989). A label outside the vocabulary makes its loss NaN.
"""

import torch
import triton
import triton.language as tl

from ._common import LN2, LOG2E
from ._device import device_arch
from ._launch import launch
from ._tiles import cross_entropy_tile

__all__ = ["PADDED_TO", "cross_entropy_"]

PADDED_TO = 64  # columns; Triton sees the alignment of a mask's end in multiples of 16


@triton.jit(do_not_specialize=["smoothing"])
def _cross_entropy_kernel(
    loss_ptr,  # [M], fp32
    hit_ptr,  # [M], bool
    x_ptr,  # [M, N]; becomes the gradient
    bias_ptr,  # [N] or None
    labels_ptr,  # [M], int64
    stride_x_m,
    smoothing,
    N: tl.constexpr,
    N_PADDED: tl.constexpr,  # columns of x; from N on they are read and written and mean nothing
    GRADIENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x_m
    label = tl.load(labels_ptr + row)
    offs_n = tl.arange(0, BLOCK_N)
    top = float("-inf")
    total = 0.0
    sum_x = 0.0
    for start in range(0, N, BLOCK_N):
        mask = start + offs_n < N
        x = tl.load(x_ptr + start + offs_n, mask=start + offs_n < N_PADDED, other=0.0)
        x = tl.where(mask, x.to(tl.float32), 0.0)  # [BLOCK_N]
        if bias_ptr is not None:
            x += tl.load(bias_ptr + start + offs_n, mask=mask, other=0.0).to(tl.float32)
        sum_x += tl.sum(x, 0)
        x = tl.where(mask, x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp2((top - higher) * LOG2E)
        total += tl.sum(tl.exp2((x - higher) * LOG2E), 0)
        top = higher
    log_total = tl.log2(total) * LN2  # log-sum-exp, less the largest
    inside = (label >= 0) & (label < N)
    label = tl.where(inside, label, 0)
    x_label = tl.load(x_ptr + label).to(tl.float32)
    if bias_ptr is not None:
        x_label += tl.load(bias_ptr + label).to(tl.float32)
    loss = (log_total - (x_label - top)) * (1.0 - smoothing)
    loss += (log_total - (sum_x / N - top)) * smoothing
    tl.store(loss_ptr + row, tl.where(inside, loss, float("nan")))
    tl.store(hit_ptr + row, inside & (x_label == top))
    if GRADIENT:
        tl.debug_barrier()  # every thread has read x[label]
        for start in range(0, N, BLOCK_N):
            inside_x = start + offs_n < N_PADDED
            x = tl.load(x_ptr + start + offs_n, mask=inside_x, other=0.0).to(tl.float32)
            if bias_ptr is not None:
                mask = start + offs_n < N
                x += tl.load(bias_ptr + start + offs_n, mask=mask, other=0.0).to(tl.float32)
            gradient = tl.exp2((x - top) * LOG2E) / total - smoothing / N
            gradient -= tl.where(start + offs_n == label, 1.0 - smoothing, 0.0)
            tl.store(x_ptr + start + offs_n, gradient.to(x_ptr.dtype.element_ty), mask=inside_x)


def cross_entropy_(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    classes: int,
    smoothing: float,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of rows of logits, and which labels have the highest one.

    Args:
        x: ``[M, N or more]``, any row stride; with ``gradient`` it becomes that of the sum of the
            losses. Columns from N on hold anything; with a multiple of `PADDED_TO` of them, rows
            are read 16 bytes at a time.
        bias: ``[N]`` or None, added to every row.
        labels: int64 ``[M]``, from 0 to N - 1; elsewhere the loss is NaN.
        classes: N.
        smoothing: of the labels, 0 to 1.
        gradient: whether to overwrite ``x``.

    Returns:
        The losses, fp32 ``[M]``, and whether no logit of the row is above its label's, bool
        ``[M]``.
    """
    m, width = x.shape
    assert x.stride(1) == 1, "in place: rows must be contiguous"
    assert classes <= width, f"{classes} classes do not fit {width} columns"
    loss = torch.empty(m, dtype=torch.float32, device=x.device)
    hit = torch.empty(m, dtype=torch.bool, device=x.device)
    if m == 0:
        return loss, hit
    tile = cross_entropy_tile(classes, device_arch(x.device))
    launch(
        _cross_entropy_kernel, (m,),
        loss, hit, x, bias, labels.contiguous(), x.stride(0), float(smoothing),
        N=classes, N_PADDED=width, GRADIENT=gradient, BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return loss, hit
