"""The specification of every op, in a few lines of torch each."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_ACT = {
    None: lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def bias_activation_ref(x, bias, activation):
    return _ACT[activation](x if bias is None else x + bias)


def linear_ref(x, weight, bias=None, activation=None):
    return _ACT[activation](F.linear(x, weight, bias))


def layer_norm_ref(x, weight, bias, eps, residual=None, input_bias=None):
    if input_bias is not None:
        x = x + input_bias
    if residual is not None:
        x = x + residual
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def embed_ref(
    token_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps
):
    x = F.embedding(token_ids, word)
    if token_type is not None:
        x = x + F.embedding(token_type_ids, token_type)
    x = x + F.embedding(position_ids, position)
    return layer_norm_ref(x, weight, bias, eps)


def softmax_ref(x, mask=None, scale=1.0):
    x = x * scale
    if mask is not None:
        x = x.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else x + mask
    return torch.softmax(x, -1).masked_fill((x == -torch.inf).all(-1, keepdim=True), 0.0)
