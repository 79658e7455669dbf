"""The operations of a BERT encoder, each one function over plain tensors.

Every op validates its arguments, chooses the Triton kernel or torch (`fastbert.backend`), is
differentiable, and works under ``torch.compile(fullgraph=True)``. The specification of each is its
reference in `fastbert.ops.reference`.
"""

from .attention import attention, attention_qkv, attention_varlen
from .attention_weights import attention_weights
from .cross_entropy import linear_cross_entropy
from .dropout import dropout_seed
from .embedding import embed
from .layernorm import layer_norm
from .linear import (
    activate,
    feed_forward_add_norm,
    linear,
    linear_add_norm,
    linear_gelu,
    linear_stacked,
)
from .softmax import softmax
from .splade import linear_splade

__all__ = [
    "activate",
    "attention",
    "attention_qkv",
    "attention_varlen",
    "attention_weights",
    "dropout_seed",
    "embed",
    "feed_forward_add_norm",
    "layer_norm",
    "linear",
    "linear_add_norm",
    "linear_cross_entropy",
    "linear_gelu",
    "linear_splade",
    "linear_stacked",
    "softmax",
]
