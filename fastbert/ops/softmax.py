"""Row softmax with a scale and a mask, as attention probabilities need it."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import resolve
from .gradient import first_order_only, wants_gradient
from .reference import softmax_ref
from .registry import define

__all__ = ["softmax"]

_MAX_ROW = 8192


def _launch(x: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    from ..kernels.softmax import softmax_fwd

    return softmax_fwd(x, mask, scale=scale)


def _launch_bwd(dy: Tensor, y: Tensor, scale: float) -> Tensor:
    from ..kernels.softmax import softmax_bwd

    return softmax_bwd(dy, y, scale=scale)


_softmax = define(
    "softmax(Tensor x, Tensor? mask, float scale) -> Tensor",
    _launch,
    lambda x, mask, scale: x.new_empty(x.shape),
)


_softmax_bwd = define(
    "softmax_bwd(Tensor dy, Tensor y, float scale) -> Tensor",
    _launch_bwd,
    lambda dy, y, scale: y.new_empty(y.shape),
)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, scale):
        y = _softmax(x, None if mask is None else mask.expand(x.shape), scale)
        ctx.save_for_backward(y)
        ctx.scale = scale
        ctx.mask = None if mask is None else (mask.shape, mask.dtype)
        return y

    @staticmethod
    @first_order_only
    def backward(ctx, dy: Tensor):
        (y,) = ctx.saved_tensors
        need_x, need_mask, _ = ctx.needs_input_grad
        dmask = None
        if need_mask:
            shape, dtype = ctx.mask
            dmask = _softmax_bwd(dy, y, 1.0).sum_to_size(shape).to(dtype)
        return _softmax_bwd(dy, y, ctx.scale) if need_x else None, dmask, None


def softmax(x: Tensor, *, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """``softmax(x * scale + mask)`` over the last dimension.

    Args:
        x: ``[..., N]``, up to four dimensions.
        mask: broadcasts to ``x``; bool (True keeps an entry) or floating (added), or None.
        scale: factor for ``x``.

    Returns:
        Like ``x``, contiguous. A row whose entries are all masked gives zeros, not NaN.

    Raises:
        ValueError: a mask that does not broadcast to ``x``, more than four dimensions.

    Supported: fp32, fp16, bf16 (fp64 in torch), rows up to 8192 (any in torch), gradients
    for ``x`` and a floating mask (first order with the kernels).
    """
    if not 1 <= x.dim() <= 4:
        raise ValueError(f"softmax: expected one to four dimensions, got {tuple(x.shape)}")
    if mask is not None:
        try:
            mask.expand(x.shape)
        except RuntimeError:
            raise ValueError(
                f"softmax: expected a mask that broadcasts to {tuple(x.shape)}, "
                f"got {tuple(mask.shape)}"
            ) from None
    if resolve(x.device, x.dtype) == "torch" or x.numel() == 0:
        return softmax_ref(x, mask, scale)
    if x.shape[-1] > _MAX_ROW:
        raise NotImplementedError(
            f"softmax: expected rows of at most {_MAX_ROW}, got {x.shape[-1]}; "
            'use fastbert.backend("torch") for longer ones'
        )
    lead = (1,) * (4 - x.dim())
    wide = x if x.stride(-1) == 1 else x.contiguous()
    wide = wide.view(*lead, *x.shape)
    if wants_gradient(x, mask):
        return _Softmax.apply(wide, mask, scale).view(x.shape)
    return _softmax(wide, None if mask is None else mask.expand(wide.shape), scale).view(x.shape)
