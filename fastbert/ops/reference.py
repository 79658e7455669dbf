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
]


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
) -> Tensor:
    """``(softmax(q @ k.T * scale + bias) * kept) @ v``; q ``[B, H, Sq, D]``, k and v
    ``[B, H, Sk, D]``, kept (the factors of dropout) ``[B, H, Sq, Sk]``."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = bias
    if key_mask is not None:
        keep = key_mask[:, None, None, :]
        mask = keep if bias is None else bias.masked_fill(~keep, -math.inf)
    p = softmax_ref(q @ k.transpose(-1, -2), mask, scale)
    return (p if kept is None else p * kept.to(p)) @ v


def attention_varlen_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    scale: float | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """`attention_ref` for each sequence on its own; q ``[Tq, H, D]``, k and v ``[Tk, H, D]``, kept
    ``[B, H, longest Sq, longest Sk]``."""
    parts = []
    rows = (q.split(list(lengths_q)), k.split(list(lengths_k)), v.split(list(lengths_k)))
    for i, qkv in enumerate(zip(*rows, strict=True)):
        factors = None if kept is None else kept[i : i + 1, :, : lengths_q[i], : lengths_k[i]]
        one = (t.transpose(0, 1)[None] for t in qkv)
        parts.append(attention_ref(*one, scale=scale, kept=factors)[0].transpose(0, 1))
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
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    padding_idx: int | None = None,
) -> Tensor:
    """``LayerNorm(word[token_ids] + token_type[token_type_ids] + position[position_ids])``."""
    x = F.embedding(token_ids, word, padding_idx)
    if token_type is not None:
        x = x + F.embedding(token_type_ids, token_type)
    x = x + F.embedding(position_ids, position)
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
