"""BERT's embeddings: three gathers, their sum and a LayerNorm, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import resolve
from .gradient import run_kernel
from .reference import embed_ref
from .registry import define

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
) -> Tensor:
    from ..kernels.embedding import embedding_fwd

    return embedding_fwd(
        token_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps=eps
    )[0]


_embed = define(
    "embed(Tensor token_ids, Tensor position_ids, Tensor? token_type_ids, Tensor word, "
    "Tensor position, Tensor? token_type, Tensor weight, Tensor bias, float eps) -> Tensor",
    _launch,
    lambda ids, pos, types, word, position, token_type, weight, bias, eps: word.new_empty(
        ids.shape[0], word.shape[1]
    ),
)


def embed(
    token_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
) -> Tensor:
    """``LayerNorm(word[token_ids] + token_type[token_type_ids] + position[position_ids])``.

    Args:
        token_ids, position_ids: int32 or int64 ``[T]``.
        token_type_ids: the same, or None where ``token_type`` is None.
        word, position, token_type: the tables, ``[rows, E]``.
        weight, bias: ``[E]`` of the LayerNorm.
        eps: added to the variance.

    Returns:
        ``[T, E]`` in the dtype of the tables.

    Raises:
        TypeError: ids that are not integers.
        ValueError: shapes or devices that do not fit; on a CPU also ids outside their table. On a
        GPU
            a check would cost a synchronisation: there an id outside its table gives a row of NaN.

    Supported: fp32, fp16, bf16 (fp64 in torch), widths up to 8192 (any in torch), gradients.
    """
    pairs = [("token_ids", token_ids, word), ("position_ids", position_ids, position)]
    if (token_type_ids is None) != (token_type is None):
        raise ValueError("embed: expected token_type_ids and token_type together or not at all")
    if token_type_ids is not None:
        pairs.append(("token_type_ids", token_type_ids, token_type))
    for name, ids, table in pairs:
        if ids.shape != token_ids.shape or ids.dim() != 1:
            raise ValueError(f"embed: expected {name} [T], got {tuple(ids.shape)}")
        if ids.device != table.device:
            raise ValueError(
                f"embed: expected {name} on {table.device}, where its table is, got {ids.device}"
            )
        if table.shape[1:] != weight.shape:
            raise ValueError(
                f"embed: expected tables [rows, {weight.shape[0]}], got {tuple(table.shape)}"
            )
        check_range(name, ids, table.shape[0])
    args = (
        token_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps,
    )  # fmt: skip
    if (
        resolve(word.device) == "torch"
        or token_ids.numel() == 0
        or torch.is_autocast_enabled(word.device.type)
    ):
        return embed_ref(*args)
    return run_kernel(_embed, embed_ref, *args)


def check_range(name: str, ids: Tensor, rows: int) -> None:
    """Raise for ids outside their table, where looking at them costs no synchronisation: on a CPU.

    Raises:
        TypeError: ids that are not integers.
        ValueError: ids outside 0 to ``rows - 1``.
    """
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"embed: expected {name} in int32 or int64, got {ids.dtype}")
    if ids.device.type != "cpu" or ids.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(t) for t in ids.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(
            f"embed: expected {name} from 0 to {rows - 1}, the rows of its table, "
            f"got values from {low} to {high}"
        )
