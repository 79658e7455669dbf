"""The masked-LM loss: cross-entropy of a decoder's logits, which never exist as one tensor.

Rows are taken in chunks. A chunk's logits are made, turned into losses and into their own gradient
in place, and used up in the two products of backward before the next chunk comes; what is kept for
backward has the sizes of the rows and of the weight. Since the loss is one number, its upstream
gradient is a factor that can be applied later.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import resolve
from .gradient import wants_gradient
from .linear import check_decoder, linear, weight_gradient
from .registry import define

__all__ = ["at_least_one", "labelled_rows", "linear_cross_entropy", "summed_cross_entropy"]

CHUNK = 1024  # rows; enough for a product, and 60 MB of 16-bit logits for BERT's vocabulary
_REDUCTIONS = ("mean", "sum")


def _launch(
    x: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    classes: int,
    smoothing: float,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    from ..kernels.cross_entropy import cross_entropy_

    return cross_entropy_(x, bias, labels, classes=classes, smoothing=smoothing, gradient=gradient)


_cross_entropy_ = define(
    "cross_entropy_(Tensor(a!) x, Tensor? bias, Tensor labels, int classes, float smoothing, "
    "bool gradient) -> (Tensor, Tensor)",
    _launch,
    lambda x, *rest: tuple(x.new_empty(x.shape[0], dtype=d) for d in (torch.float32, torch.bool)),
)


def _losses_in_torch(
    logits: Tensor, labels: Tensor, smoothing: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """What the kernel does: losses and hits ``[M]``; the logits become their gradient."""
    wide = logits.float() if logits.dtype.itemsize == 2 else logits
    top = wide.amax(-1, keepdim=True)
    lse = (wide - top).exp_().sum(-1, keepdim=True).log_().add_(top)
    picked = wide.gather(-1, labels[:, None])
    hits = picked == top
    losses = (lse - picked) * (1.0 - smoothing)
    if smoothing:
        losses = losses + (lse - wide.mean(-1, keepdim=True)) * smoothing
    if gradient:
        share = wide.sub_(lse).exp_()
        if smoothing:
            share.sub_(smoothing / share.shape[-1])
        share.scatter_add_(-1, labels[:, None], torch.full_like(picked, smoothing - 1.0))
        if share is not logits:
            logits.copy_(share)
    return losses.flatten(), hits.flatten()


class _Chunks:
    """Walks over chunks of rows, adding up the loss and, if wanted, the gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None, smoothing: float, dtype: torch.dtype):
        self.on_kernels = resolve(weight.device, dtype) == "triton"
        self.weight, self.smoothing = weight.to(dtype), smoothing
        self.bias = None if bias is None else bias.to(dtype)
        self.buffer: Tensor | None = None

    def losses(self, rows: Tensor, labels: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and hits, summed, and the logits ``[M, V]`` or their gradient."""
        losses, hits, logits = self._by_row(rows, labels, gradient)
        return losses.sum(), hits.sum(), logits

    def _by_row(
        self, rows: Tensor, labels: Tensor, gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self.on_kernels:
            logits = linear(rows, self.weight, self.bias)
            return *_losses_in_torch(logits, labels, self.smoothing, gradient), logits
        vocabulary = self.weight.shape[0]
        if self.buffer is None:
            from ..kernels.cross_entropy import PADDED_TO

            width = -(-vocabulary // PADDED_TO) * PADDED_TO
            self.buffer = rows.new_empty(rows.shape[0], width)
            self.buffer[:, vocabulary:] = 0.0
        padded = self.buffer[: rows.shape[0]]
        logits = padded[:, :vocabulary]
        torch.mm(rows, self.weight.t(), out=logits)
        found = _cross_entropy_(padded, self.bias, labels, vocabulary, self.smoothing, gradient)
        return *found, logits


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses, and of the hits; gradients are made along the way."""

    @staticmethod
    def forward(ctx, x, weight, bias, labels, smoothing, dtype):
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        chunks = _Chunks(weight, bias, smoothing, dtype)
        wide = _wide(dtype)
        total, correct = _zeros(x, dtype)
        dx = torch.empty_like(x) if need_x else None
        dweight = dbias = None
        for start in range(0, max(x.shape[0], 1), CHUNK):  # no rows make gradients of zero
            rows = x[start : start + CHUNK].to(dtype)
            loss, hits, g = chunks.losses(rows, labels[start : start + CHUNK], gradient=True)
            total += loss
            correct += hits
            if need_x:
                dx[start : start + CHUNK] = g @ chunks.weight
            if need_weight:
                part = weight_gradient(g, rows)
                # In one chunk the product's own sums do; several are added up in fp32.
                if dweight is None:
                    dweight = part if x.shape[0] <= CHUNK else part.to(wide)
                else:
                    dweight += part
            if need_bias:
                part = g.sum(0, dtype=wide)
                dbias = part if dbias is None else dbias.add_(part)
        ctx.smoothing = smoothing
        ctx.save_for_backward(x, weight, bias, labels, dx, dweight, dbias)
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx, upstream: Tensor, _: None):
        *inputs, labels, dx, dweight, dbias = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: by the plain formula, once more
            return *_gradients_to_differentiate(*inputs, labels, ctx, upstream), None, None, None
        grads = (
            None if g is None else (g * upstream).to(t.dtype)
            for g, t in zip((dx, dweight, dbias), inputs, strict=True)
        )
        return *grads, None, None, None


def _gradients_to_differentiate(x, weight, bias, labels, ctx, upstream) -> list[Tensor | None]:
    total = F.cross_entropy(
        F.linear(x, weight, bias), labels, reduction="sum", label_smoothing=ctx.smoothing
    )
    wanted = [t for t, need in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if need]
    grads = iter(torch.autograd.grad(total, wanted, upstream.to(total.dtype), create_graph=True))
    return [next(grads) if need else None for need in ctx.needs_input_grad[:3]]


class Labelled(NamedTuple):
    """Which rows have a label, their labels, int64 ``[N]`` each, and whether one is padding."""

    rows: Tensor
    labels: Tensor
    on_padding: bool


def labelled_rows(
    labels: Tensor, num_classes: int, ignore_index: int = -100, mask: Tensor | None = None
) -> Labelled:
    """What has a label.

    On a GPU this waits, once, for what is queued there: ask before the work that the rows come
    from.

    Args:
        mask: as many as labels, 0 for padding.

    Raises:
        ValueError: a label that is neither a class nor ``ignore_index``.
    """
    labels = labels.reshape(-1)
    labelled = labels != ignore_index
    if not labels.numel():
        return Labelled(labels, labels, False)
    facts = [labelled.sum(), *labels.where(labelled, 0).aminmax()]
    if mask is not None:
        facts.append((labelled & (mask.reshape(-1).to(labels.device) == 0)).any())
    count, low, high, *on_padding = torch.stack(facts).tolist()
    rows = labelled.nonzero_static(size=count).flatten()  # nonzero() would ask for the count again
    labels = labels[rows]
    if low < 0 or high >= num_classes:
        low, high = torch.stack(labels.aminmax()).tolist()
        raise ValueError(
            f"labels: expected values from 0 to {num_classes - 1}, or {ignore_index} for what "
            f"has none, got values from {low} to {high}"
        )
    return Labelled(rows, labels, any(on_padding))


def summed_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` with ``reduction="sum"``, of rows that all have a label in range; and
    how many labels are right, int64: no logit of the row is above theirs.

    Nothing is looked at on the host; a label out of range makes the result NaN on a GPU.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if wants_gradient(x, weight, bias):
        return _LinearCrossEntropy.apply(x, weight, bias, labels, label_smoothing, dtype)
    chunks = _Chunks(weight, bias, label_smoothing, dtype)
    total, correct = _zeros(x, dtype)
    for rows, targets in zip(x.split(CHUNK), labels.split(CHUNK), strict=True):
        loss, hits, _ = chunks.losses(rows.to(dtype), targets, gradient=False)
        total += loss
        correct += hits
    return total, correct


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """``cross_entropy(x @ weight.T + bias, labels)`` without a tensor of all logits.

    Args:
        x: ``[N, E]``.
        weight, bias: ``[V, E]`` and ``[V]`` or None.
        labels: int64 ``[N]``, from 0 to V - 1 or ``ignore_index``.
        ignore_index: rows with this label are left out before anything is computed.
        label_smoothing: share of the target that is spread over all classes, 0 to 1.
        reduction: ``"mean"`` over the rows that are not ignored, or ``"sum"``.
        num_items: what to divide the sum by instead of their number: with gradient accumulation
            the number in all batches of a step.

    Returns:
        A scalar, fp32 (fp64 for fp64). Without a single label it is 0 with zero gradients, where
        torch's mean is NaN.

    Raises:
        ValueError: shapes that do not fit, a label out of range, an unknown reduction, a smoothing
            outside 0 to 1, ``num_items`` with a sum.

    Supported: fp32, fp16, bf16 (fp64 in torch), gradients of any order, autocast. Rows are chosen
    on the host, which on a GPU costs a synchronisation. Inside ``torch.compile`` it is the plain
    formula, which a compiler fuses itself.
    """
    check_decoder("linear_cross_entropy", x, weight, bias)
    if labels.shape != x.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: expected int64 labels ({x.shape[0]},), "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"linear_cross_entropy: expected reduction 'mean' or 'sum', got {reduction!r}"
        )
    if num_items is not None and reduction == "sum":
        raise ValueError("linear_cross_entropy: num_items is for reduction='mean', got 'sum'")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(
            f"linear_cross_entropy: expected label_smoothing from 0 to 1, got {label_smoothing}"
        )
    if torch.compiler.is_compiling():
        total = F.cross_entropy(
            F.linear(x, weight, bias), labels, reduction="sum", ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )  # fmt: skip
        count = (labels != ignore_index).sum()
    else:
        rows, chosen, _ = labelled_rows(labels, weight.shape[0], ignore_index)
        if rows.shape[0] < x.shape[0]:
            x = x[rows]
        total, _ = summed_cross_entropy(x, weight, bias, chosen, label_smoothing)
        count = rows.shape[0]
    if reduction == "sum":
        return total
    return total / at_least_one(count if num_items is None else num_items)


def at_least_one(count: int | Tensor) -> int | Tensor:
    """What a sum is divided by: without labels it is 0 already."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _zeros(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What losses and hits are added to."""
    return (
        torch.zeros((), dtype=_wide(dtype), device=x.device),
        torch.zeros((), dtype=torch.int64, device=x.device),
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What is summed in: fp32 for the 16-bit types."""
    return torch.promote_types(dtype, torch.float32)
