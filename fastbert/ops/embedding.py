"""BERT's embeddings: three gathers, their sum and a LayerNorm, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import resolve
from .gradient import first_order_only, one_dtype, wants_gradient
from .layernorm import layer_norm_bwd, norm_dtype
from .recompute import remember
from .reference import embed_ref, layer_norm_ref
from .registry import define, takes_launches

__all__ = ["check_range", "embed"]


def _launch(
    token_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    keep_sum: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.embedding import embedding_fwd

    y, z, statistics = embedding_fwd(
        token_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps=eps,
        keep_sum=keep_sum, out_dtype=dtype,
    )  # fmt: skip
    if not keep_sum:
        return y, word.new_empty(0), word.new_empty(0, dtype=torch.float32)
    return y, z, statistics


def _shapes(ids, position_ids, types, word, position, token_type, weight, bias, eps, keep, dtype):
    shape = (ids.shape[0], word.shape[1])
    return (
        word.new_empty(shape, dtype=dtype),
        word.new_empty(shape) if keep else word.new_empty(0),
        word.new_empty((2, ids.shape[0]) if keep else 0, dtype=torch.float32),
    )


_embed = define(
    "embed(Tensor token_ids, Tensor position_ids, Tensor? token_type_ids, Tensor word, "
    "Tensor position, Tensor? token_type, Tensor weight, Tensor bias, float eps, bool keep_sum, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _launch,
    _shapes,
)


class _Embed(torch.autograd.Function):
    """The gradient of the sum is LayerNorm's; torch adds up its rows by id, without atomics."""

    @staticmethod
    def forward(
        ctx, ids, position_ids, types, word, position, token_type, weight, bias, eps, paddings,
        dtype,
    ):  # fmt: skip
        y, z, statistics = _embed(
            ids, position_ids, types, word, position, token_type, weight, bias, eps, True, dtype
        )
        ctx.save_for_backward(ids, position_ids, types, z, statistics, weight)
        ctx.rows = [0 if t is None else t.shape[0] for t in (word, position, token_type)]
        ctx.bias_dtype, ctx.paddings = bias.dtype, paddings
        ctx.mark_non_differentiable(z, statistics)
        ctx.set_materialize_grads(False)  # z and statistics would get zeros of their sizes
        return y, z, statistics

    @staticmethod
    @first_order_only
    def backward(ctx, dy: Tensor | None, *unused):
        if dy is None:
            return (None,) * 11
        *all_ids, z, statistics, weight = ctx.saved_tensors
        need_tables, (need_weight, need_bias) = ctx.needs_input_grad[3:6], ctx.needs_input_grad[6:8]
        dz, _, totals = layer_norm_bwd(
            dy, z, statistics, weight, z.dtype, None, (need_weight, need_bias, False),
            one_dtype(weight.dtype, ctx.bias_dtype), 0.0, None,
        )  # fmt: skip
        total = iter(totals)
        paddings = [-1 if each is None else each for each in ctx.paddings]
        tables = [
            # An id outside its table has made the loss NaN; it must not write outside as well.
            torch.ops.aten.embedding_dense_backward(
                dz, ids.clamp(0, rows - 1), rows, padding, False
            )
            if needed
            else None
            for ids, rows, padding, needed in zip(
                all_ids, ctx.rows, paddings, need_tables, strict=True
            )
        ]
        return (
            *(None,) * 3,
            *tables,
            next(total).to(weight.dtype) if need_weight else None,
            next(total).to(ctx.bias_dtype) if need_bias else None,
            *(None,) * 3,
        )


def embed(
    token_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
) -> Tensor:
    """``LayerNorm(word[token_ids] + token_type[token_type_ids] + position[position_ids])``.

    Args:
        token_ids: int32 or int64 ``[T]``.
        position_ids: the same, or None for 0 to ``T - 1``, where all are one sequence.
        token_type_ids: the same, or None for zeros.
        word, position, token_type: the tables, ``[rows, E]``.
        weight, bias: ``[E]`` of the LayerNorm.
        eps: added to the variance.
        padding_idx, position_padding_idx: a row of ``word``, and one of ``position``, that gets no
            gradient, as in ``torch.nn.Embedding``.

    Returns:
        ``[T, E]`` in the dtype of the tables, fp32 under autocast.

    Raises:
        TypeError: ids that are not integers.
        ValueError: shapes or devices that do not fit, more tokens than positions, token types
            without a table; on a CPU also ids outside their table. On a GPU a check would cost a
            synchronisation: there such an id gives a row of NaN.

    Supported: fp32, fp16, bf16 (fp64 in torch), widths up to 8192 (any in torch), gradients (first
    order with the kernels), the same bits in every run.
    """
    if token_type is None and token_type_ids is not None:
        raise ValueError("embed: expected a table token_type for token_type_ids, got None")
    if position_ids is None and token_ids.shape[0] > position.shape[0]:
        raise ValueError(
            f"embed: expected at most {position.shape[0]} tokens, the rows of the position table, "
            f"got {token_ids.shape[0]}"
        )
    given = [
        ("token_ids", token_ids, word), ("position_ids", position_ids, position),
        ("token_type_ids", token_type_ids, token_type),
    ]  # fmt: skip
    for name, ids, table in given:
        if table is not None and table.shape[1:] != weight.shape:
            raise ValueError(
                f"embed: expected tables [rows, {weight.shape[0]}], got {tuple(table.shape)}"
            )
        if ids is None:
            continue
        if ids.shape != token_ids.shape or ids.dim() != 1:
            raise ValueError(f"embed: expected {name} [T], got {tuple(ids.shape)}")
        if ids.device != table.device:
            raise ValueError(
                f"embed: expected {name} on {table.device}, where its table is, got {ids.device}"
            )
        check_dtype(name, ids)

    def check_ranges() -> None:
        for name, ids, table in given:
            if ids is not None:
                check_range(name, ids, table.shape[0])

    in_torch = resolve(word.device, word.dtype) == "torch" or token_ids.numel() == 0
    if position_ids is None and not (in_torch and position_padding_idx is None):
        position_ids = torch.arange(len(token_ids), device=token_ids.device)
    if token_type_ids is None and token_type is not None and not in_torch:
        token_type_ids = torch.zeros_like(token_ids)
    args = (
        token_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps,
    )  # fmt: skip
    if in_torch:
        try:
            return _in_torch(*args, (padding_idx, position_padding_idx))
        except IndexError:  # which does not say of what
            check_ranges()
            raise
    check_ranges()
    dtype = norm_dtype(word)
    if not wants_gradient(word, position, token_type, weight, bias):
        return _embed(*args, False, dtype)[0]
    y, z, statistics = _Embed.apply(*args, (padding_idx, position_padding_idx, None), dtype)
    return y if torch.compiler.is_compiling() else remember(y, z, statistics, weight, bias)


def _in_torch(
    token_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps, paddings
) -> Tensor:  # fmt: skip
    """`embed_ref`, which is added up in place where nobody can tell."""
    tables = [t for t in (word, position, token_type) if t is not None]
    if (
        wants_gradient(*tables, weight, bias)
        or not takes_launches((token_ids, *tables))
        or not all(t.dtype == word.dtype for t in tables)
    ):
        return embed_ref(
            token_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps,
            *paddings,
        )  # fmt: skip
    total = torch.embedding(word, token_ids)
    if token_type is not None:
        types = token_type_ids
        total += token_type[0] if types is None else torch.embedding(token_type, types)
    places = position_ids
    total += position[: len(token_ids)] if places is None else torch.embedding(position, places)
    return layer_norm_ref(total, weight, bias, eps)


def check_dtype(name: str, ids: Tensor) -> None:
    """Raise for ids that are not integers.

    Raises:
        TypeError: they are not.
    """
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"embed: expected {name} in int32 or int64, got {ids.dtype}")


def check_range(name: str, ids: Tensor, rows: int) -> None:
    """Raise for ids outside their table, where looking at them costs no synchronisation: on a CPU.

    Raises:
        TypeError: ids that are not integers.
        ValueError: ids outside 0 to ``rows - 1``.
    """
    check_dtype(name, ids)
    if ids.device.type != "cpu" or ids.numel() == 0 or torch.compiler.is_compiling():
        return
    if type(ids) is not Tensor:  # a fake tensor has no values
        return
    low, high = (int(t) for t in ids.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(
            f"embed: expected {name} from 0 to {rows - 1}, the rows of its table, "
            f"got values from {low} to {high}"
        )
