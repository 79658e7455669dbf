"""What goes into the first layer: checked inputs, the batch they make, and the embedded rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import pairwise
from operator import is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..encoder import normalised
from ..ops.embedding import check_range
from ..packing import PackedBatch, PaddedBatch
from ..weights import Linear, Norm, Projection
from . import modules
from .family import EmbeddingParts
from .obstacle import say_once

__all__ = [
    "Sums", "check_inputs", "embed_rows", "lengths_of", "make_batch", "read_sums", "refuse_packed",
]  # fmt: skip


def check_inputs(
    model: nn.Module,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> Tensor:
    """The input, ids ``[B, S]`` or embeddings ``[B, S, E]``, once it is known to fit."""
    this = type(model).__name__
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    x = input_ids if inputs_embeds is None else inputs_embeds
    name, dims = ("input_ids", 2) if inputs_embeds is None else ("inputs_embeds", 3)
    if x.dim() != dims:
        axes = "[batch, length]" if dims == 2 else "[batch, length, hidden]"
        raise ValueError(f"{this}: expected {name} {axes}, got {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(
            f"{this}: expected at least one token, got {name} of shape {tuple(x.shape)}; "
            "leave empty batches out"
        )
    embeddings, sums = model.embeddings, model.family.sums
    table = getattr(embeddings, sums.position).weight
    device = table.device
    if device.type != "meta" and x.device != device:  # offloaded weights are on "meta"
        raise ValueError(f"{this}: expected {name} on {device}, where the model is, got {x.device}")
    shape = batch_size, length = x.shape[:2]
    if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape != shape:
        raise ValueError(
            f"{this}: expected an attention_mask {tuple(shape)}, got {tuple(attention_mask.shape)}"
        )
    if attention_mask is not None and attention_mask.dim() not in (2, 4):
        raise ValueError(
            f"{this}: expected an attention_mask [batch, length] or "
            f"[batch, heads or 1, length, length], got {tuple(attention_mask.shape)}; "
            "a mask per query needs a dimension for the heads: mask[:, None]"
        )
    for other, ids in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
        if ids is None:
            continue
        message = f"{this}: expected {other} {tuple(shape)}, got {tuple(ids.shape)}"
        if ids.dim() != 2 or ids.shape[1] != length:
            raise ValueError(message)
        if ids.shape[0] not in (1, batch_size):
            raise RuntimeError(  # torch's error and its words, which transformers lets through
                f"The size of tensor a ({batch_size}) must match the size of tensor b "
                f"({ids.shape[0]}) at non-singleton dimension 0\n{message}"
            )
    positions = table.shape[0] - sums.first_position(embeddings)
    counts = sums.counts_tokens and inputs_embeds is None and not torch.compiler.is_compiling()
    if counts and position_ids is None and length > positions:  # padding has no number
        length = int((x != embeddings.padding_idx).sum(1).max())
    if position_ids is None and length > positions:
        raise ValueError(
            f"{this}: expected at most {positions} tokens a sequence, the rows of the position "
            f"table, got {length}; truncate (tokenizer(..., truncation=True)) or split the text"
        )
    return x


def make_batch(
    model: nn.Module,
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    kwargs: dict[str, Any],
    *,
    keep_padding: bool,
    reads_first: bool,
    by_column: bool,
) -> PackedBatch | PaddedBatch:
    """How this call's rows are laid out: packed, or padded where shapes may not depend on data.

    Args:
        reads_first: whether column 0 is wanted of every sequence, padding or not.
        by_column: whether it matters how many columns are between two tokens.
    """
    shape = tuple(x.shape[:2])
    if attention_mask is not None and attention_mask.dim() == 4:
        return PaddedBatch(shape, bias=_bias(attention_mask, model.dtype))
    traced = (
        torch.compiler.is_compiling()
        or x.device.type == "meta"
        or type(x) not in (Tensor, nn.Parameter)
    )
    if traced or (keep_padding and attention_mask is not None):
        mask = None if attention_mask is None else attention_mask.to(x.device, torch.bool)
        return PaddedBatch(shape, key_mask=mask)
    if attention_mask is None:
        lengths = _packed_lengths(model, shape, position_ids, kwargs)
        if lengths is None:
            return _dense(*shape) if x.device.type == "cpu" else PackedBatch.dense(*shape, x.device)
        return PackedBatch.from_lengths(lengths, x.device)
    batch = PackedBatch.from_mask(attention_mask, x.device)
    if (reads_first and not batch.starts_real) or (by_column and _has_holes(attention_mask)):
        # Column 0 is padding here: it has to be computed, as in transformers. Or padding between
        # tokens keeps them apart.
        return PaddedBatch(shape, key_mask=attention_mask.to(x.device, torch.bool))
    return batch


@lru_cache(maxsize=64)
def _dense(batch_size: int, length: int) -> PackedBatch:
    """A batch without padding on a CPU, where no stream has to have made it."""
    with torch.inference_mode(False):
        return PackedBatch.dense(batch_size, length, "cpu")


def _has_holes(mask: Tensor) -> bool:
    """Whether a sequence has padding between its tokens."""
    real = mask != 0
    begins = (real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0]
    return bool((begins > 1).any())


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask per query as what is added to the scores."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
            ~mask, float("-inf")
        )
    if not mask.is_floating_point():
        raise ValueError(
            f"expected a 4-D attention_mask in bool or floating point, got {mask.dtype}"
        )
    return mask.to(dtype)


def refuse_packed(model: nn.Module, kwargs: dict[str, Any], reason: str) -> None:
    """Keep packed sequences from transformers' own code, which would take them for one.

    Raises:
        ValueError: there are some, and its attention does not know ``cu_seq_lens_q``.
    """
    bounds = kwargs.get("cu_seq_lens_q")
    implementation = model.config._attn_implementation or ""
    if bounds is None or bounds.numel() <= 2 or implementation.startswith("flash_attention"):
        return
    raise ValueError(
        f"{type(model).__name__}: expected a model that can take the {bounds.numel() - 1} packed "
        f"sequences of cu_seq_lens_q, got one that runs transformers' own code ({reason}), whose "
        f"{implementation} attention would let them attend to each other; pass a padded batch"
    )


def lengths_of(cu_seqlens: Tensor, shape: tuple[int, int], what: str) -> list[int]:
    """Of the sequences of a row that came packed.

    Args:
        cu_seqlens: ``cu_seq_lens_q``, where each ends, with a zero in front.
        shape: of the input, ``(1, tokens)``.
        what: it is for, for the message.

    Raises:
        ValueError: they are not those of this row.
    """
    ends = cu_seqlens.tolist()
    if shape[0] != 1 or ends[0] != 0 or ends[-1] != shape[1] or sorted(ends) != ends:
        raise ValueError(
            f"{what}: expected cu_seq_lens_q to rise from 0 to the number of tokens of one packed "
            f"row, got {ends} for input of shape {shape}"
        )
    return [end - start for start, end in pairwise(ends)]


def _packed_lengths(
    model: nn.Module,
    shape: tuple[int, int],
    position_ids: Tensor | None,
    kwargs: dict[str, Any],
) -> list[int] | None:
    """Sequences in a row that came packed: ``cu_seq_lens_q``, or positions that restart, where
    transformers takes them so too."""
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        return lengths_of(cu_seqlens, shape, type(model).__name__)
    if position_ids is None or shape[0] != 1:
        return None
    positions = position_ids[0]
    starts = (positions == positions.min()).nonzero().flatten().tolist()
    if len(starts) < 2 or starts[0] != 0 or len(starts) == shape[1]:
        return None  # as many starts as tokens are no positions at all
    implementation = model.config._attn_implementation or ""
    if not implementation.startswith("flash_attention"):
        say_once(
            f"takes {len(starts)} runs of position_ids in a batch of one for one sequence, as "
            f"transformers' {implementation} attention does; cu_seq_lens_q keeps packed sequences "
            "apart"
        )
        return None
    say_once(
        f"takes a batch of one whose position_ids restart for {len(starts)} packed sequences, as "
        f"transformers' {implementation} does; with an attention_mask of ones it is one sequence"
    )
    return [end - start for start, end in zip(starts, [*starts[1:], shape[1]], strict=True)]


class _Made(NamedTuple):
    """What was found in the buffers of embeddings, for as long as they are the same and nothing is
    written to them.

    Attributes:
        columns, zeros: whether every row of the positions is the one, every type the other, which
            is what transformers puts there.
    """

    buffers: list[Tensor]
    versions: list[int]
    columns: bool
    zeros: bool


_made: WeakKeyDictionary[nn.Module, _Made] = WeakKeyDictionary()


def _as_made(embeddings: nn.Module, positions: Tensor, types: Tensor | None) -> tuple[bool, bool]:
    """`_Made.columns` and `_Made.zeros`; without types there are no others."""
    buffers = [positions] if types is None else [positions, types]
    if torch.compiler.is_compiling() or any(b.is_meta or b.is_inference() for b in buffers):
        return False, types is None
    if not all(type(b) in (Tensor, nn.Buffer) for b in buffers):  # a fake one cannot be looked at
        return False, types is None
    versions = [b._version for b in buffers]
    made = _made.get(embeddings)
    if made is None or made.versions != versions or not all(map(is_, made.buffers, buffers)):
        columns = torch.arange(positions.shape[-1]).to(positions).expand_as(positions)
        made = _made[embeddings] = _Made(
            buffers, versions, torch.equal(positions, columns), types is None or not types.any()
        )
    return made.columns, made.zeros


def _token_types(
    embeddings: nn.Module, positions: Tensor | None, length: int, device: torch.device
) -> Tensor:
    """Token types of who gave none, ``[1 or B, S]``: what stands in the buffer, by position."""
    index = torch.arange(length, device=device)[None] if positions is None else positions
    types = embeddings.token_type_ids.to(device)
    return types.expand(index.shape[0], -1).gather(1, index.long())


def _counted(
    padding_idx: int, input_ids: Tensor | None, length: int, device: torch.device
) -> Tensor:
    """Positions that count the tokens that are not padding, from behind ``padding_idx`` on,
    ``[B, S]``; padding has ``padding_idx``. Of embeddings all are taken for tokens, ``[1, S]``."""
    if input_ids is None:
        return torch.arange(padding_idx + 1, padding_idx + 1 + length, device=device)[None]
    real = input_ids != padding_idx
    return real.cumsum(1) * real + padding_idx


def _default_ids(
    embeddings: nn.Module,
    sums: EmbeddingParts,
    position_ids: Tensor | None,
    input_ids: Tensor | None,
    length: int,
    device: torch.device,
    *,
    alone: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Positions and token types of who gave none, ``[1 or B, S]``.

    None where they are what transformers' buffers are made with: columns, and zeros. For one
    sequence on a GPU, where these would be launches, views of the buffers are as good.
    """
    launching = alone and device.type != "cpu"
    stored, types = embeddings.position_ids, getattr(embeddings, "token_type_ids", None)
    types = None if sums.token_type is None else types
    positions = position_ids
    if positions is None and sums.counts_tokens:
        positions = _counted(embeddings.padding_idx, input_ids, length, device)
    elif positions is None and launching and types is not None and stored.device == device:
        return stored[:, :length], types[:, :length]
    columns, zeros = _as_made(embeddings, stored, types)
    if positions is None and not columns:
        positions = stored[:, :length].to(device)
    if zeros:
        return positions, None
    return positions, _token_types(embeddings, positions, length, device)


class Sums(NamedTuple):
    """What embeddings compute with, as it was read of a model.

    Attributes:
        word, position, kind: the tables; a family may have no token types.
        norm: None where there is none.
        tensors: weights of the tables, weight and bias of the norm, where one op takes them: the
            tables are plain ones and the norm reads as tensors. Else None.
        paddings: rows of words and positions without a gradient.
        dropout: its probability now.
        projection: to the width of the layers, or None.
    """

    word: nn.Module
    position: nn.Module
    kind: nn.Module | None
    norm: Norm | Callable[[Tensor], Tensor] | None
    tensors: tuple[Tensor | None, ...] | None
    paddings: tuple[int | None, int | None]
    dropout: float
    projection: Projection | None


def read_sums(model: nn.Module) -> Sums:
    """Of a model whose modules were looked at."""
    embeddings, sums = model.embeddings, model.family.sums
    word, position = getattr(embeddings, sums.word), getattr(embeddings, sums.position)
    kind = None if sums.token_type is None else getattr(embeddings, sums.token_type)
    norm = None if sums.norm is None else modules.norm(getattr(embeddings, sums.norm))
    projection = model.family.projection_of(model)
    tables, tensors = (word, position, kind), None
    if (
        isinstance(norm, Norm)
        and all(table is None or modules.is_plain_embedding(table) for table in tables)
        and (kind is None or kind.padding_idx is None)
    ):
        weights = (None if table is None else table.weight for table in tables)
        tensors = (*weights, norm.weight, norm.bias)
    return Sums(
        *tables,
        norm,
        tensors,
        paddings=tuple(getattr(table, "padding_idx", None) for table in (word, position)),
        dropout=modules.dropout_p(getattr(embeddings, sums.dropout)) or 0.0,
        projection=None if projection is None else modules.projection(projection),
    )


def embed_rows(
    model: nn.Module,
    batch: PackedBatch | PaddedBatch,
    sums: Sums,
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    arguments: Mapping[str, Any],
) -> Tensor:
    """The rows ``[T, E]`` that enter the first layer.

    Args:
        sums: of the model.
        arguments: all of the call, of which a family may read more.
    """
    embeddings, parts = model.embeddings, model.family.sums
    x = input_ids if inputs_embeds is None else inputs_embeds

    def rows(ids: Tensor) -> Tensor:
        one_for_all = ids.shape[0] == 1 and x.shape[0] != 1
        return batch.pack(ids.expand(x.shape[0], *ids.shape[1:]) if one_for_all else ids)

    if position_ids is None or (token_type_ids is None and parts.token_type is not None):
        position_ids, types = _default_ids(
            embeddings, parts, position_ids, input_ids, x.shape[1], x.device, alone=x.shape[0] == 1
        )
        token_type_ids = types if token_type_ids is None else token_type_ids
    words = None if inputs_embeds is not None else rows(input_ids)
    positions = None if position_ids is None else rows(position_ids)
    word, position, kind, norm = sums[:4]
    types = None if kind is None or token_type_ids is None else rows(token_type_ids)
    further = parts.further_sum(embeddings, arguments, rows, x.device)
    plain = sums.tensors is not None and words is not None and further is None
    is_one = x.shape[0] == 1 and (isinstance(batch, PaddedBatch) or batch.indices is None)
    if positions is None and not (plain and is_one):
        positions = batch.columns(x.device)
    if types is None and kind is not None and not plain:
        types = torch.zeros_like(positions)
    if plain:
        hidden = ops.embed(
            words, positions, types, *sums.tensors, eps=norm.eps,
            padding_idx=sums.paddings[0], position_padding_idx=sums.paddings[1],
        )  # fmt: skip
    else:
        tables = {"input_ids": word, "token_type_ids": kind, "position_ids": position}
        ids = (words, types, positions)
        for (which, table), values in zip(tables.items(), ids, strict=True):
            if values is not None and isinstance(table, nn.Embedding):
                check_range(which, values, table.weight.shape[0])
        hidden = batch.pack(inputs_embeds) if words is None else word(words)
        hidden = hidden if kind is None else hidden + kind(types)
        hidden = hidden + position(positions)
        hidden = hidden if further is None else hidden + further
        hidden = hidden if norm is None else normalised(hidden, norm)
    hidden = F.dropout(hidden, sums.dropout) if sums.dropout else hidden
    projection = sums.projection
    if projection is None:
        return hidden
    return ops.linear(hidden, *projection) if isinstance(projection, Linear) else projection(hidden)
