"""The specification of every op: what it computes, in a few lines of torch each.

References run on any device, in any dtype up to fp64, are differentiable and know nothing of tiles
or packing tricks. Kernels are tested against them, and torch is what they are where no kernel runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "attention_ref",
    "attention_varlen_ref",
    "bias_activation_ref",
    "embed_ref",
    "layer_norm_ref",
    "linear_ref",
    "softmax_ref",
    "splade_ref",
]


_LOG2E = math.log2(math.e)


def softmax_ref(x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """``softmax(x * scale + mask)`` by row; a bool mask keeps True; a row without a key is 0."""
    x = x * scale
    if mask is not None:
        x = x.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else x + mask
    if mask is None:
        return torch.softmax(x, dim=-1)
    alone = (x == -math.inf).all(-1, keepdim=True)  # filled first: their gradient would be NaN
    return torch.softmax(x.masked_fill(alone, 0.0), dim=-1).masked_fill(alone, 0.0)


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    kept: Tensor | None = None,
    operands: torch.dtype | None = None,
    late_sum: bool = False,
) -> Tensor:
    """``(softmax(q @ k.T * scale + bias) * kept) @ v``; q ``[B, H, Sq, D]``, k and v
    ``[B, H, Sk, D]``, kept (the factors of dropout) ``[B, H, Sq, Sk]``.

    operands: compute as fused kernels do, torch's own among them: in units of log2; backward makes
    the weights again from scores that are computed a second time and their log-sum-exp, and has the
    result instead of a sum over weights; the weights, their gradient and that result are rounded to
    this dtype, for the matrix units. In fp64, which is the truth, nothing of it happens.
    ``late_sum``: forward rounds weights before their sum divides them, as flash attention does, and
    not behind it, as math attention does.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = bias
    if key_mask is not None:
        keep = key_mask[:, None, None, :]
        mask = keep if bias is None else bias.masked_fill(~keep, -math.inf)
    scores = q @ k.transpose(-1, -2)
    if operands is not None and q.dtype != torch.float64:
        kept = None if kept is None else kept.to(scores)
        with torch.no_grad():
            again = _added_backwards(q, k) * scale
        scores = _RoundGradient.apply(scores * scale, operands)
        return _WeighRounded.apply(scores, again, mask, v, kept, operands, late_sum)
    p = softmax_ref(scores, mask, scale)
    return (p if kept is None else p * kept.to(p)) @ v


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(x.dtype)


def _added_backwards(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` with its terms in the other order, so that it is not by luck what the same terms
    are elsewhere, to the bit."""
    return a.flip(-1) @ b.flip(-1).transpose(-1, -2)


class _RoundGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, operands: torch.dtype) -> Tensor:
        ctx.operands = operands
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _rounded(gradient, ctx.operands), None


class _WeighRounded(torch.autograd.Function):
    """``(softmax(scores + mask) * kept) @ v`` in units of log2, with 16-bit operands, and backward
    by the scores ``again``, log-sum-exp and delta."""

    @staticmethod
    def forward(ctx, scores, again, mask, v, kept, operands, late_sum):
        if mask is not None and mask.dtype == torch.bool:
            scores, again = (t.masked_fill(~mask, -math.inf) for t in (scores, again))
        elif mask is not None:
            scores, again = scores + mask, again + mask
        in_log2 = scores * _LOG2E
        largest = in_log2.amax(-1, keepdim=True) if scores.shape[-1] else in_log2.sum(-1, True)
        weights = torch.exp2(in_log2 - largest.masked_fill(largest == -math.inf, math.inf))
        total = weights.sum(-1, keepdim=True)
        lse = largest + total.log2()
        total = total.clamp_min(torch.finfo(total.dtype).tiny)
        weights = weights if late_sum else weights / total
        weights = _rounded(weights if kept is None else weights * kept, operands)
        out = weights @ v
        out = out / total if late_sum else out
        ctx.save_for_backward(again, lse, v, kept, _rounded(out, operands))
        ctx.mask_shape, ctx.operands = None if mask is None else mask.shape, operands
        return out

    @staticmethod
    def backward(ctx, gradient):
        again, lse, v, kept, out = ctx.saved_tensors
        p = torch.exp2(again * _LOG2E - lse.masked_fill(lse == -math.inf, math.inf))
        weights = _rounded(p if kept is None else p * kept, ctx.operands)
        dp = _added_backwards(gradient, v)
        dp = dp if kept is None else dp * kept
        ds = p * (dp - (gradient * out).sum(-1, keepdim=True))
        dmask = ds.sum_to_size(ctx.mask_shape) if ctx.needs_input_grad[2] else None
        return ds, None, dmask, weights.transpose(-1, -2) @ gradient, None, None, None


def attention_varlen_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    scale: float | None = None,
    kept: Tensor | None = None,
    operands: torch.dtype | None = None,
    bias: Tensor | None = None,
    late_sum: bool = False,
) -> Tensor:
    """`attention_ref` for each sequence on its own; q ``[Tq, H, D]``, k and v ``[Tk, H, D]``, kept
    ``[B, H, longest Sq, longest Sk]``, bias ``[H, longest Sq, longest Sk]``."""
    parts = []
    rows = (q.split(list(lengths_q)), k.split(list(lengths_k)), v.split(list(lengths_k)))
    for i, qkv in enumerate(zip(*rows, strict=True)):
        places = (..., slice(lengths_q[i]), slice(lengths_k[i]))
        factors = None if kept is None else kept[i : i + 1][places]
        added = None if bias is None else bias[None][places]
        one = (t.transpose(0, 1)[None] for t in qkv)
        part = attention_ref(
            *one, bias=added, scale=scale, kept=factors, operands=operands, late_sum=late_sum
        )
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts)


def layer_norm_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    input_bias: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """``LayerNorm((x + input_bias) * kept + residual) * weight + bias`` over the last dimension;
    kept (the factors of dropout) like x."""
    if input_bias is not None:
        x = x + input_bias
    if kept is not None:
        x = x * kept.to(x)
    if residual is not None:
        x = x + residual
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def embed_ref(
    token_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
) -> Tensor:
    """``LayerNorm(word[token_ids] + token_type[token_type_ids] + position[position_ids])``; None
    are the first positions and the first token type."""
    x = F.embedding(token_ids, word, padding_idx)
    if token_type is not None and token_type_ids is None:
        x = x + token_type[0]
    elif token_type is not None:
        x = x + F.embedding(token_type_ids, token_type)
    if position_ids is None:
        x = x + position[: len(token_ids)]
    else:
        x = x + F.embedding(position_ids, position, position_padding_idx)
    return layer_norm_ref(x, weight, bias, eps)


def bias_activation_ref(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``activation(x + bias)``."""
    x = x if bias is None else x + bias
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "relu":
        return F.relu(x)
    assert activation == "silu", activation
    return F.silu(x)


def linear_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """``activation(x @ weight.T + bias)``."""
    out = F.linear(x, weight, bias)
    return out if activation is None else bias_activation_ref(out, None, activation)


def splade_ref(logits: Tensor, lengths: Sequence[int], pooling: str, activation: str) -> Tensor:
    """``log(1 + relu(logits))``, for ``"log1p_relu"`` ``log(1 + .)`` of that, pooled over each
    sequence of ``[T, V]``; zeros where there is no token."""
    weights = logits.relu().log1p()
    weights = weights.log1p() if activation == "log1p_relu" else weights
    return torch.stack(
        [
            own.sum(0) if pooling == "sum" or not len(own) else own.max(0).values
            for own in weights.split(list(lengths))
        ]
    )
