"""Row softmax with a scale and a mask, as attention probabilities need it."""

from __future__ import annotations

from torch import Tensor

from .backend import resolve
from .gradient import run_kernel
from .reference import softmax_ref
from .registry import define

__all__ = ["softmax"]

_MAX_ROW = 8192


def _launch(x: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    from ..kernels.softmax import softmax_fwd

    return softmax_fwd(x, mask, scale=scale)


_softmax = define(
    "softmax(Tensor x, Tensor? mask, float scale) -> Tensor",
    _launch,
    lambda x, mask, scale: x.new_empty(x.shape),
)


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

    Supported: fp32, fp16, bf16 (fp64 in torch), rows up to 8192 (any in torch), gradients.
    """
    if not 1 <= x.dim() <= 4:
        raise ValueError(f"softmax: expected one to four dimensions, got {tuple(x.shape)}")
    if mask is not None:
        try:
            mask = mask.expand(x.shape)
        except RuntimeError:
            raise ValueError(
                f"softmax: expected a mask that broadcasts to {tuple(x.shape)}, "
                f"got {tuple(mask.shape)}"
            ) from None
    if resolve(x.device) == "torch" or x.numel() == 0:
        return _in_torch(x, mask, scale)
    if x.shape[-1] > _MAX_ROW:
        raise NotImplementedError(
            f"softmax: expected rows of at most {_MAX_ROW}, got {x.shape[-1]}; "
            'use fastbert.backend("torch") for longer ones'
        )
    lead = (1,) * (4 - x.dim())
    wide = x if x.stride(-1) == 1 else x.contiguous()
    mask = None if mask is None else mask.view(*lead, *mask.shape)
    return run_kernel(_softmax, _in_torch, wide.view(*lead, *x.shape), mask, scale).view(x.shape)


def _in_torch(x: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return softmax_ref(x, mask=mask, scale=scale)
