"""``attn_implementation="fastbert"``: packed attention in encoders of transformers that have no
family here.

Rows stay padded between attentions, so it gains less than a family does; it is for what has rotary
positions or gated layers, as NomicBERT and EuroBERT have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from .. import ops
from ..packing import PackedBatch
from .inputs import lengths_of

__all__ = ["NAME", "attend", "register_attention"]

NAME = "fastbert"
_NOT_DONE = ("sliding_window", "softcap", "s_aux", "head_mask", "position_bias")
# Of a mask, or of bounds, that all layers of a call are given: its version then, and the batch.
_batches: WeakIdKeyDictionary = WeakIdKeyDictionary()


def register_attention() -> None:
    """Make ``attn_implementation="fastbert"`` known to transformers, for this process."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _padding_mask)


def _padding_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Hands on the padding; transformers' own looks whether there is any, which no graph can."""
    if attention_mask is not None and torch.compiler.is_compiling():
        return attention_mask
    return flash_attention_mask(*args, attention_mask=attention_mask, **kwargs)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over real tokens, in transformers' form.

    Args:
        module: whose attention it is; ``num_key_value_groups`` and ``is_causal`` are read of it.
        query: ``[B, H, S, D]``; key, value: ``[B, H or a part of it, S, D]``.
        attention_mask: ``[B, S]``, where tokens are real, or None.
        dropout, scaling: as in `fastbert.ops.attention_varlen`.
        kwargs: what else the model was called with; ``cu_seq_lens_q`` keeps the packed sequences of
            one row apart, as it does with transformers' flash attentions.

    Returns:
        ``[B, S, H, D]`` with zeros at padding, and None for the weights.

    Raises:
        NotImplementedError: causal attention, keys of other sequences, or something else that is
            not padding; packed sequences in a compiled call.
        ValueError: ``cu_seq_lens_q`` that are not those of one row.
    """
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    asked = [name for name in _NOT_DONE if kwargs.get(name) is not None]
    asked += ["is_causal"] * bool(causal and query.shape[2] > 1)
    if key.shape[2] != query.shape[2]:
        asked.append("keys of other sequences")
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is not None and attention_mask is not None:
        asked.append("a mask beside cu_seq_lens_q")
    if bounds is not None and torch.compiler.is_compiling():
        asked.append("cu_seq_lens_q while compiling")
    if asked:
        raise NotImplementedError(
            f"attn_implementation={NAME!r}: expected an encoder's full self-attention, got "
            f"{', '.join(asked)} in a {type(module).__name__}; use 'sdpa'"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise NotImplementedError(
            f"attn_implementation={NAME!r}: expected a mask [batch, length] for padding, got "
            f"{tuple(attention_mask.shape)}; use 'sdpa'"
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    if bounds is not None:
        of_keys, what = kwargs.get("cu_seq_lens_k"), type(module).__name__
        batch = _packed_of(bounds, query, what)
        if of_keys is not None and _packed_of(of_keys, query, what).lengths != batch.lengths:
            raise NotImplementedError(
                f"attn_implementation={NAME!r}: expected cu_seq_lens_k as cu_seq_lens_q, got "
                f"{of_keys.tolist()} and {bounds.tolist()}"
            )
        rows = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
        return ops.attention_varlen(*rows, batch, scale=scaling, dropout_p=dropout)[None], None
    if attention_mask is not None and torch.compiler.is_compiling():  # shapes must not depend on it
        real = attention_mask.bool()
        context = ops.attention(
            query, key, value, key_mask=real, scale=scaling, dropout_p=dropout
        ).transpose(1, 2)
        return context * real[:, :, None, None], None
    batch = _batch_of(attention_mask, query)
    rows = (batch.pack(t.transpose(1, 2)) for t in (query, key, value))
    context = ops.attention_varlen(*rows, batch, scale=scaling, dropout_p=dropout)
    return batch.unpack(context), None


def _batch_of(mask: Tensor | None, query: Tensor) -> PackedBatch:
    if mask is None:
        return PackedBatch.dense(query.shape[0], query.shape[2], query.device)
    # transformers makes a tensor of its own of the mask in every call: nobody writes to it.
    return _once(mask, lambda: PackedBatch.from_mask(mask, query.device))


def _packed_of(bounds: Tensor, query: Tensor, what: str) -> PackedBatch:
    shape = query.shape[0], query.shape[2]

    def make() -> PackedBatch:
        return PackedBatch.from_lengths(lengths_of(bounds, shape, what), query.device)

    if bounds.is_inference():  # may be written to without a trace
        return make()
    batch = _once(bounds, make)
    return batch if shape == (1, batch.num_tokens) else make()  # which says what is wrong


def _once(given: Tensor, make: Callable[[], PackedBatch]) -> PackedBatch:
    """What was made of a tensor, as long as nobody has written to it."""
    version = -1 if given.is_inference() else given._version
    found = _batches.get(given)
    if found is None or found[0] != version:
        found = _batches[given] = (version, make())
    return found[1]
