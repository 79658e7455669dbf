"""The operations of a BERT encoder, each one function over plain tensors.

Every op validates its arguments, chooses the Triton kernel or torch (`fastbert.backend`), is
differentiable, and works under ``torch.compile(fullgraph=True)``. The specification of each is its
reference in `fastbert.ops.reference`.
"""

from .attention import attention, attention_varlen
from .embedding import embed
from .layernorm import layer_norm
from .linear import activate, linear, linear_add_norm, linear_gelu
from .softmax import softmax

__all__ = [
    "activate",
    "attention",
    "attention_varlen",
    "embed",
    "layer_norm",
    "linear",
    "linear_add_norm",
    "linear_gelu",
    "softmax",
]
