"""The packed layers of an encoder as functions of plain tensors.

A layer is ``hidden [T, E]``, a batch (`fastbert.packing`) and its weights (`fastbert.weights`);
there are no modules here and no transformers. Rows never see padding: every product runs over real
tokens only, and attention finds the boundaries of sequences in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .ops import onednn, onednn_layer
from .ops.attention_kernels import MAX_DROPOUT_LENGTH, MAX_HEAD_SIZE
from .ops.attention_torch import varlen_in_torch, way_of_one
from .ops.backend import resolve
from .ops.dropout import dropout_seeds
from .ops.gradient import wants_gradient
from .ops.inference import LayerLaunches, only_kernels, only_onednn
from .ops.layer_gradient import attention_half, takes_attention_half, whole_layer
from .ops.repeated import Repeats
from .packing import PackedBatch, PaddedBatch
from .weights import Layers, LayerWeights, Linear, Norm, Projection, Stacked

__all__ = [
    "encode_layer",
    "encode_layers",
    "encode_on_onednn",
    "normalised",
    "train_layers",
]


def encode_layers(hidden: Tensor, batch: PackedBatch | PaddedBatch, layers: Layers) -> Tensor:
    """All layers of BERT in inference, one after the other.

    Args:
        hidden: ``[T, E]`` packed rows.
        batch: where the sequences are.
        layers: their weights.

    Returns:
        ``[T, E]``.
    """
    if layers.tensors and isinstance(batch, PackedBatch) and batch.max_seqlen:
        given = layers.tensors if batch.bias is None else [*layers.tensors, batch.bias]
        if only_kernels(hidden, given, layers.each[0].head_size):
            launch = _launch_pre_norm_layers if layers.each[0].pre_norm else _launch_layers
            return launch(hidden, batch, layers)
        if only_onednn(hidden, layers.tensors):
            return encode_on_onednn(hidden, batch, layers.each)
    for weights in layers.each:
        hidden = encode_layer(hidden, batch, weights)
    return hidden


def train_layers(hidden: Tensor, batch: PackedBatch | PaddedBatch, layers: Layers) -> Tensor:
    """`encode_layers` where gradients may be wanted: layers that are alike make the launches of the
    first one again."""
    repeats = _repeats(hidden, batch, layers)
    if repeats is None:
        for weights in layers.each:
            hidden = encode_layer(hidden, batch, weights)
        return hidden
    for weights, tensors in zip(layers.each, layers.trained, strict=True):
        if not wants_gradient(hidden, *tensors, batch.bias):
            hidden = encode_layer(hidden, batch, weights)
            continue
        hidden = whole_layer(
            hidden, batch, tensors, head_size=weights.head_size, scale=weights.scale,
            attention_dropout_p=weights.attention_dropout, activation=weights.activation,
            eps=(weights.attention_norm.eps, weights.output_norm.eps),
            dropout_p=(weights.hidden_dropout, weights.output_dropout),
            seeds=_seeds(hidden, weights), repeats=repeats,
        )  # fmt: skip
    return hidden


def _repeats(hidden: Tensor, batch: PackedBatch | PaddedBatch, layers: Layers) -> Repeats | None:
    """For layers that may be trained whole, if these are."""
    if not layers.trained or not isinstance(batch, PackedBatch):
        return None
    first, tensors = layers.each[0], [t for tensors in layers.trained for t in tensors]
    if batch.bias is not None:
        tensors.append(batch.bias)
    taken = hidden.is_contiguous() and takes_attention_half(
        hidden, batch, first.head_size, first.scale, first.attention_dropout, *tensors
    )
    return Repeats() if taken else None


def _launch_layers(hidden: Tensor, batch: PackedBatch, layers: Layers) -> Tensor:
    """`encode_layers` where `only_kernels` has found that nothing but the libraries' products and
    the kernels will run: no decision is left, and each is launched at once."""
    launches = None
    for weights in layers.each:
        if launches is None or not layers.alike:
            launches = LayerLaunches(
                batch, weights.scale, weights.head_size, weights.activation,
                (weights.attention_norm.eps, weights.output_norm.eps),
            )  # fmt: skip
        context = launches.attend(*(F.linear(hidden, *part) for part in weights.qkv))
        hidden = launches.linear_add_norm(
            0, context, *weights.attention_output, hidden, *weights.attention_norm[:2]
        )
        inner = launches.linear(hidden, *weights.intermediate)
        hidden = launches.linear_add_norm(
            1, inner, *weights.output, hidden, *weights.output_norm[:2]
        )
    return hidden


def _launch_pre_norm_layers(hidden: Tensor, batch: PackedBatch, layers: Layers) -> Tensor:
    """`_launch_layers` for norms in front: where a sum is made it is normed as well, for the half
    that comes next, be it the next layer's."""
    launches = None
    rows = normalised(hidden, layers.each[0].attention_norm)
    for weights, following in zip(layers.each, [*layers.each[1:], None], strict=True):
        next_norm = (following or weights).attention_norm
        if launches is None or not layers.alike:
            launches = LayerLaunches(
                batch, weights.scale, weights.head_size, weights.activation,
                (weights.output_norm.eps, next_norm.eps), keep_sum=True,
            )  # fmt: skip
        context = launches.attend(*(F.linear(rows, *part) for part in weights.qkv))
        rows, hidden = launches.linear_add_norm(
            0, context, *weights.attention_output, hidden, *weights.output_norm[:2]
        )
        inner = launches.linear(rows, *weights.intermediate)
        if following is not None:
            rows, hidden = launches.linear_add_norm(
                1, inner, *weights.output, hidden, *next_norm[:2]
            )
    return hidden + F.linear(inner, *weights.output)


def encode_on_onednn(
    hidden: Tensor,
    batch: PackedBatch,
    each: list[LayerWeights],
    products: ModuleType = onednn,
) -> Tensor:
    """`encode_layers` on a CPU, where `fastbert.ops.inference.only_onednn` has found that nothing
    else will run.

    Args:
        hidden: ``[T, E]`` packed rows.
        batch: where the sequences are.
        each: weights as they are, or as ``products.packed`` has made them.
        products: `fastbert.ops.onednn` or `fastbert.ops.onednn_int8`.

    Returns:
        ``[T, E]``.
    """
    count = hidden.shape[0]
    more = onednn.bucket_of(count) - count
    if more:  # by copies of a row: finite where that is, which attention asks for
        hidden = torch.cat((hidden, hidden[-1:].expand(more, -1)))
    multiply = _multiply_pre_norm_layer if each[0].pre_norm else _multiply_layer
    if products is onednn and _is_short_text(hidden, batch, each[0]):
        multiply = _multiply_at_once
    for weights in each:
        hidden = multiply(hidden, batch, weights, products)
    return hidden[:count] if more else hidden


def _is_short_text(rows: Tensor, batch: PackedBatch, weights: LayerWeights) -> bool:
    """Whether a layer like this may be one call of `onednn_layer`."""
    return (
        rows.shape[0] <= onednn_layer.UP_TO
        and len(batch.lengths) == 1
        and rows.dtype == torch.float32
        and batch.bias is None
        and not weights.pre_norm
    )


def _multiply_at_once(
    hidden: Tensor, batch: PackedBatch, weights: LayerWeights, products: ModuleType
) -> Tensor:
    """`_multiply_layer` for one short text."""
    rows = None
    if weights.activation in onednn.EPILOGUES:
        behind = (
            *weights.attention_output, *weights.attention_norm,
            *weights.intermediate, *weights.output, *weights.output_norm,
        )  # fmt: skip
        rows = onednn_layer.layer_of_one(
            hidden, batch.lengths[0], weights.qkv, behind, activation=weights.activation,
            head_size=weights.head_size, scale=weights.scale,
        )  # fmt: skip
    return _multiply_layer(hidden, batch, weights, products) if rows is None else rows


def _multiply_layer(
    hidden: Tensor, batch: PackedBatch, weights: LayerWeights, products: ModuleType
) -> Tensor:
    """`encode_layer`; rows behind those of the batch may hold anything."""
    context = _multiply_and_attend(hidden, batch, weights, products)
    total = products.product_add(context, *weights.attention_output, hidden)
    hidden = _normed(total, weights.attention_norm)
    inner = _multiply_and_activate(hidden, weights, products)
    return _normed(products.product_add(inner, *weights.output, hidden), weights.output_norm)


def _multiply_pre_norm_layer(
    hidden: Tensor, batch: PackedBatch, weights: LayerWeights, products: ModuleType
) -> Tensor:
    """`_multiply_layer` for norms in front."""
    rows = _normed(hidden, weights.attention_norm)
    context = _multiply_and_attend(rows, batch, weights, products)
    hidden = products.product_add(context, *weights.attention_output, hidden)
    inner = _multiply_and_activate(_normed(hidden, weights.output_norm), weights, products)
    return products.product_add(inner, *weights.output, hidden)


def _multiply_and_attend(
    rows: Tensor, batch: PackedBatch, weights: LayerWeights, products: ModuleType
) -> Tensor:
    context = _attend_in_torch(
        [products.product(rows, *part, None) for part in weights.qkv], batch, weights
    )
    more = rows.shape[0] - context.shape[0]
    return F.pad(context, (0, 0, 0, more)) if more else context


def _multiply_and_activate(rows: Tensor, weights: LayerWeights, products: ModuleType) -> Tensor:
    if weights.activation in onednn.EPILOGUES:
        return products.product(rows, *weights.intermediate, weights.activation)
    inner = products.product(rows, *weights.intermediate, None)
    return ops.activate(inner, weights.activation)


def _attend_in_torch(parts: list[Tensor], batch: PackedBatch, weights: LayerWeights) -> Tensor:
    """q, k and v, ``[T or more, 3 * E]`` or three of ``[T or more, E]`` -> ``[T or more, E]``."""
    lengths, scale = batch.lengths, weights.scale
    count, length = len(lengths), lengths[0]
    if len(parts) > 1:
        q, k, v = (t.view(t.shape[0], -1, weights.head_size) for t in parts)
    else:
        q, k, v = parts[0].view(parts[0].shape[0], 3, -1, weights.head_size).unbind(1)
    bias = None if batch.bias is None else batch.bias.to(q.dtype)
    if count == 1:
        attend = way_of_one(q, 1, length, scale, bias)
        if attend is not None:
            return attend(q, k, v).flatten(1)
    if batch.num_tokens < q.shape[0]:
        q, k, v = (t[: batch.num_tokens] for t in (q, k, v))
    if len(set(lengths)) > 1 or way_of_one(q, count, length, scale, bias) is not None:
        return varlen_in_torch(
            q, k, v, batch, batch, scale, 0.0, False, bias, one_by_one=True
        ).flatten(1)
    by_head = (t.view(count, length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
    context = F.scaled_dot_product_attention(*by_head, bias, scale=scale)
    return context.transpose(1, 2).reshape(count * length, -1)


def _normed(total: Tensor, norm: Norm) -> Tensor:
    # What F.layer_norm calls behind questions that are answered here.
    return torch.layer_norm(total, total.shape[-1:], norm.weight, norm.bias, norm.eps)


def encode_layer(
    hidden: Tensor,
    batch: PackedBatch | PaddedBatch,
    weights: LayerWeights,
    attentions: list[Tensor] | None = None,
) -> Tensor:
    """One encoder layer of BERT (Devlin et al., 1810.04805), or one with its norms in front (Xiong
    et al., 2002.04745).

    Args:
        hidden: ``[T, E]`` packed rows.
        batch: where the sequences are.
        weights: the layer.
        attentions: if given, the attention weights ``[B, H, S, S]`` are appended; where gradients
            are wanted or weights are dropped, the result is made from them.

    Returns:
        ``[T, E]``.
    """
    if weights.pre_norm:
        return _encode_pre_norm(hidden, batch, weights, attentions)
    in_attention, *behind = _seeds(hidden, weights)
    if attentions is None and _is_one_half(hidden, batch, weights):
        hidden = attention_half(
            hidden, batch, *weights.qkv, *weights.attention_output, *weights.attention_norm[:2],
            head_size=weights.head_size, scale=weights.scale,
            attention_dropout_p=weights.attention_dropout, eps=weights.attention_norm.eps,
            dropout_p=weights.hidden_dropout, seeds=(in_attention, behind[0]),
        )  # fmt: skip
    else:
        context = _attend(hidden, batch, weights, attentions, in_attention)
        hidden = _add_norm(
            context, weights.attention_output, hidden, weights.attention_norm,
            weights.hidden_dropout, behind[0],
        )  # fmt: skip
    first, second, norm = weights.intermediate, weights.output, weights.output_norm
    if (
        isinstance(first, Linear)
        and isinstance(weights.activation, str)
        and isinstance(second, Linear)
        and isinstance(norm, Norm)
    ):
        return ops.feed_forward_add_norm(
            hidden, *first, weights.activation, *second, norm.weight, norm.bias, eps=norm.eps,
            dropout_p=weights.output_dropout, seed=behind[1],
        )  # fmt: skip
    inner = _project(hidden, first, weights.activation)
    return _add_norm(inner, second, hidden, norm, weights.output_dropout, behind[1])


def _seeds(hidden: Tensor, weights: LayerWeights) -> tuple[Tensor | None, ...]:
    """Of dropout in attention, behind it and at the end of a layer, where kernels drop something.

    One launch draws all three, whichever operations the layer is computed by: what is asked for
    beside, or who computes it again, must not change what is dropped.
    """
    chances = weights.attention_dropout, weights.hidden_dropout, weights.output_dropout
    if (
        not any(chances)
        or hidden.numel() == 0
        or torch.compiler.is_compiling()
        or resolve(hidden.device, hidden.dtype) == "torch"
    ):
        return (None,) * 3
    seeds = dropout_seeds(hidden.device, 3)
    return tuple(seed if p else None for seed, p in zip(seeds, chances, strict=True))


def _encode_pre_norm(
    hidden: Tensor,
    batch: PackedBatch | PaddedBatch,
    weights: LayerWeights,
    attentions: list[Tensor] | None,
) -> Tensor:
    rows = normalised(hidden, weights.attention_norm)
    context = _attend(rows, batch, weights, attentions, None)
    mixed = _project(context, weights.attention_output)
    hidden = hidden + F.dropout(mixed, weights.hidden_dropout)
    inner = _project(
        normalised(hidden, weights.output_norm), weights.intermediate, weights.activation
    )
    return hidden + F.dropout(_project(inner, weights.output), weights.output_dropout)


def normalised(x: Tensor, norm: Norm | Callable[[Tensor], Tensor]) -> Tensor:
    """Rows behind a norm."""
    if isinstance(norm, Norm):
        return ops.layer_norm(x, norm.weight, norm.bias, eps=norm.eps)
    return norm(x)


def _is_one_half(hidden: Tensor, batch: PackedBatch | PaddedBatch, weights: LayerWeights) -> bool:
    """Whether all up to the first norm is one function in training."""
    if not (
        isinstance(batch, PackedBatch)
        and isinstance(weights.qkv, Stacked)
        and isinstance(weights.attention_output, Linear)
        and isinstance(weights.attention_norm, Norm)
    ):
        return False
    parts = (*weights.qkv.weights, *weights.qkv.biases, *weights.attention_output, batch.bias)
    tensors = [t for t in (*parts, *weights.attention_norm[:2]) if t is not None]
    return takes_attention_half(
        hidden, batch, weights.head_size, weights.scale, weights.attention_dropout, *tensors
    )


def _project_together(hidden: Tensor, weights: LayerWeights) -> Tensor | None:
    """``[T, E]`` -> ``[T, 3, H, D]`` where one product makes q, k and v, else None."""
    qkv = weights.qkv
    if not isinstance(qkv, Stacked):
        return None
    return ops.linear_stacked(hidden, *qkv).unflatten(-1, (3, -1, weights.head_size))


def _project_heads(hidden: Tensor, weights: LayerWeights) -> tuple[Tensor, Tensor, Tensor]:
    """``[T, E]`` -> q, k, v ``[T, H, D]``."""
    qkv = _project_together(hidden, weights)
    if qkv is not None:
        return qkv.unbind(1)
    q, k, v = (
        _project(hidden, projection).unflatten(-1, (-1, weights.head_size))
        for projection in weights.qkv
    )
    return q, k, v


def _attend(
    hidden: Tensor,
    batch: PackedBatch | PaddedBatch,
    weights: LayerWeights,
    attentions: list[Tensor] | None,
    seed: Tensor | None,
) -> Tensor:
    """The context of every token, ``[T, E]`` -> ``[T, E]``."""
    packed = isinstance(batch, PackedBatch)
    longest = batch.max_seqlen if packed else batch.padded_shape[1]
    if weights.head_size > MAX_HEAD_SIZE or longest > MAX_DROPOUT_LENGTH:
        seed = None  # torch does it, and draws for itself
    options = {"scale": weights.scale, "dropout_p": weights.attention_dropout, "seed": seed}
    unfused = {"unfused": weights.unfused}
    if packed and attentions is None:
        qkv = _project_together(hidden, weights)
        if qkv is not None:
            bias = None if batch.bias is None else batch.bias.to(qkv.dtype)
            return ops.attention_qkv(qkv, batch, bias=bias, **options, **unfused).flatten(1)
    q, k, v = _project_heads(hidden, weights)
    if attentions is not None:
        shown = ops.attention_weights(q, k, batch, **options)
        attentions.append(shown)
        if shown.requires_grad or weights.attention_dropout:
            values = (batch.unpack if packed else batch.view)(v).transpose(1, 2)
            context = shown.to(v.dtype) @ values
            return batch.pack(context.transpose(1, 2)).flatten(1)
    if packed:
        bias = None if batch.bias is None else batch.bias.to(q.dtype)
        return ops.attention_varlen(q, k, v, batch, bias=bias, **options, **unfused).flatten(1)
    q, k, v = (batch.view(t).transpose(1, 2) for t in (q, k, v))
    context = ops.attention(
        q, k, v, key_mask=batch.key_mask, bias=batch.bias, **options, **unfused,
        shared=None if torch.compiler.is_compiling() else batch.shared,
    )  # fmt: skip
    return context.transpose(1, 2).flatten(0, 1).flatten(1)


def _project(
    x: Tensor, projection: Projection, activation: str | Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    named = isinstance(activation, str)
    if isinstance(projection, Linear):
        fused = activation if named else None
        out = ops.linear(x, projection.weight, projection.bias, activation=fused)
    else:
        out = projection(x)
        out = ops.activate(out, activation) if named else out
    return activation(out) if callable(activation) else out


def _add_norm(
    x: Tensor,
    projection: Projection,
    residual: Tensor,
    norm: Norm | Callable[[Tensor], Tensor],
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """``norm(dropout(projection(x)) + residual)``."""
    if isinstance(projection, Linear) and isinstance(norm, Norm):
        return ops.linear_add_norm(
            x, projection.weight, projection.bias, residual, norm.weight, norm.bias, eps=norm.eps,
            dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
    out = _project(x, projection)
    if isinstance(norm, Norm):
        return ops.layer_norm(
            out, norm.weight, norm.bias, eps=norm.eps, residual=residual, dropout_p=dropout_p,
            seed=seed,
        )  # fmt: skip
    return norm(F.dropout(out, dropout_p) + residual)
