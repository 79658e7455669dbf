"""Everything that can be launched: each kernel with what the compiler specialises it on.

`KERNELS` is the one list of kernels. An entry says what a kernel computes, which op launches it,
and enumerates its `Variant`s for an architecture: all tiles that the tables can choose, or a tile
that is given. The compile test, ``fastbert kernels`` and the tuner see what is listed here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from . import (
    _cost,
    _sums,
    attention,
    attention_bwd_kernels,
    cross_entropy,
    embedding,
    layernorm,
    linear,
    softmax,
)
from ._attention_variants import attention_bwd_variants, attention_variants
from ._common import ACTIVATIONS
from ._tiles import (
    AttentionTile,
    GemmTile,
    RowTile,
    bias_activation_tile,
    cross_entropy_tile,
    gemm_tile,
    layernorm_bwd_tile,
    layernorm_tile,
    softmax_tile,
)
from ._variant import Kernel, Variant, changed, make_variant, up

__all__ = ["KERNELS", "Kernel", "Variant", "variants"]

_ROWS = 32768
_WIDTHS = (32, 384, 768, 1024, 4096, 8192)


def _layernorm(arch: int, dtype: torch.dtype, fields: dict[str, int]) -> Iterator[Variant]:
    rows = ("y_ptr", "x_ptr", "residual_ptr", "input_bias_ptr", "weight_ptr", "bias_ptr")
    tensors = dict.fromkeys(rows)
    training = {**tensors, "z_ptr": None, "mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
    training["seed_ptr"] = "*i64"
    inference = ("z_ptr", "mean_ptr", "rstd_ptr", "seed_ptr")
    forms = {  # what there is, what not
        "residual and bias": (tensors, inference),
        "plain": (tensors, (*inference, "residual_ptr", "input_bias_ptr")),
        "residual, bias, dropout, sum": (training, ()),
    }
    for width in _WIDTHS:
        for tile in changed([layernorm_tile(width, arch)], fields):
            constants = {"N": width, "ROWS": tile.rows, "BLOCK_N": tile.block_n}
            for form, (given, none) in forms.items():
                cost = _cost.layernorm_cost(
                    _ROWS, width, dtype.itemsize, residual=form != "plain", keep_sum=not none
                )
                yield make_variant(
                    layernorm._layernorm_fwd_kernel, f"N{width} {form}", arch, dtype, given,
                    none, constants, tile, (tile.rows * tile.block_n, "value"),
                    (f"{_ROWS} rows of {width}", cost, _ROWS * tile.block_n),
                )  # fmt: skip


def _layernorm_bwd(arch: int, dtype: torch.dtype, fields: dict[str, int]) -> Iterator[Variant]:
    statistics = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
    tensors = {**dict.fromkeys(("dx_ptr", "dy_ptr", "z_ptr", "weight_ptr")), **statistics}
    tensors |= {"dweight_ptr": "*fp32", "dbias_ptr": "*fp32"}
    forms = {
        "dropout": ({"dinput_bias_ptr": "*fp32", "dresidual_ptr": None, "seed_ptr": "*i64"}, ()),
        "plain": ({}, ("dinput_bias_ptr", "dresidual_ptr", "seed_ptr")),
    }
    for width in _WIDTHS:
        for tile in changed([layernorm_bwd_tile(width, arch)], fields):
            constants = {
                "N": width, "ROWS": tile.rows, "BLOCK_N": tile.block_n,
                "STAGES": layernorm.stages(tile.block_n),
            }  # fmt: skip
            work = (tile.rows * tile.block_n, "value")
            for form, (extra, none) in forms.items():
                cost = _cost.layernorm_bwd_cost(
                    _ROWS, width, dtype.itemsize, residual=form == "dropout"
                )
                yield make_variant(
                    layernorm._layernorm_bwd_kernel, f"N{width} {form}", arch, dtype,
                    {**tensors, **extra}, none, constants, tile, work,
                    (f"{_ROWS} rows of {width}", cost, _ROWS * tile.block_n),
                )  # fmt: skip
        yield make_variant(
            _sums._column_sums_kernel, f"N{width}", arch, dtype,
            {"out_ptr": None, "shares_ptr": "*fp32"}, (),
            {"N": width, "ROWS": _sums.ROWS, "BLOCK_N": _sums.BLOCK_N},
            RowTile(_sums.ROWS, _sums.BLOCK_N, 4), (_sums.ROWS * _sums.BLOCK_N, "value"),
            (f"1056 shares of {width}", _cost.rows_cost(1056, width, 4, 1),
             up(1056, _sums.ROWS) * up(width, _sums.BLOCK_N)),
        )  # fmt: skip
        for tile in changed([layernorm_tile(width, arch)], fields):
            yield make_variant(
                layernorm._layernorm_again_kernel, f"N{width}", arch, dtype,
                {**dict.fromkeys(("y_ptr", "z_ptr", "weight_ptr", "bias_ptr")), **statistics}, (),
                {"N": width, "ROWS": tile.rows, "BLOCK_N": tile.block_n}, tile,
                (tile.rows * tile.block_n, "value"),
                (f"{_ROWS} rows of {width}", _cost.layernorm_cost(_ROWS, width, dtype.itemsize),
                 _ROWS * tile.block_n),
            )  # fmt: skip


def _embedding(arch: int, dtype: torch.dtype, fields: dict[str, int]) -> Iterator[Variant]:
    rows = ("y_ptr", "word_ptr", "position_ptr", "token_type_ptr", "weight_ptr", "bias_ptr")
    ids = ("token_ids_ptr", "position_ids_ptr", "token_type_ids_ptr")
    tensors = {**dict.fromkeys(rows), **dict.fromkeys(ids, "*i64")}
    tensors |= {"mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
    for width in _WIDTHS:
        for tile in changed([layernorm_tile(width, arch)], fields):
            constants = {"N": width, "ROWS": tile.rows, "BLOCK_N": tile.block_n}
            for form, none in (("", ("z_ptr", "mean_ptr", "rstd_ptr")), (" sum", ())):
                yield make_variant(
                    embedding._embedding_fwd_kernel, f"N{width}{form}", arch, dtype,
                    {**tensors, "z_ptr": None}, none, constants,
                    tile, (tile.rows * tile.block_n, "value"),
                    (f"{_ROWS} tokens", _cost.embedding_cost(_ROWS, width, dtype.itemsize),
                     _ROWS * tile.block_n),
                )  # fmt: skip


def _softmax(arch: int, dtype: torch.dtype, fields: dict[str, int]) -> Iterator[Variant]:
    tensors = dict.fromkeys(("y_ptr", "x_ptr"))
    for width in (16, 128, 512, 8192):
        for tile in changed([softmax_tile(width, arch)], fields):
            # The compiler takes a stride of 1 as a constant.
            constants = {"ROWS": tile.rows, "BLOCK_N": tile.block_n, "stride_mask_n": 1}
            for kind, is_bool in ((None, False), ("*i1", True)):
                yield make_variant(
                    softmax._softmax_fwd_kernel,
                    f"N{width} {'bool' if is_bool else 'additive'} mask", arch, dtype,
                    {**tensors, "mask_ptr": kind}, (), {**constants, "IS_BOOL": is_bool}, tile,
                    (tile.rows * tile.block_n, "value"),
                    (f"{_ROWS} rows of {width}",
                     _cost.rows_cost(_ROWS, width, dtype.itemsize, 2), _ROWS * tile.block_n),
                )  # fmt: skip


def _softmax_bwd(arch: int, dtype: torch.dtype, fields: dict[str, int]) -> Iterator[Variant]:
    for width in (16, 128, 512, 8192):
        for tile in changed([softmax_tile(width, arch)], fields):
            yield make_variant(
                softmax._softmax_bwd_kernel, f"N{width}", arch, dtype,
                dict.fromkeys(("dx_ptr", "dy_ptr", "y_ptr")), (),
                {"ROWS": tile.rows, "BLOCK_N": tile.block_n}, tile,
                (tile.rows * tile.block_n, "value"),
                (f"{_ROWS} rows of {width}", _cost.rows_cost(_ROWS, width, dtype.itemsize, 3),
                 _ROWS * tile.block_n),
            )  # fmt: skip


def _linear(arch: int, dtype: torch.dtype, fields: dict[str, int]) -> Iterator[Variant]:
    products = [(activation, 4096, "ieee") for activation in ACTIVATIONS] + [("gelu", 64, "ieee")]
    if dtype == torch.float32:
        products.append(("gelu", 4096, "tf32"))
    tensors = dict.fromkeys(("y_ptr", "x_ptr", "w_ptr", "bias_ptr"))
    for activation, m, precision in products:
        for tile in changed([gemm_tile(m=m, dtype=dtype, arch=arch)], fields):
            constants = {
                "ACTIVATION": activation, "SHORT_ERF": dtype.itemsize == 2, "N": 3072, "K": 768,
                "INPUT_PRECISION": precision, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m,
            }  # fmt: skip
            label = f"{activation} {tile.block_m}x{tile.block_n}x{tile.block_k} {precision}"
            yield make_variant(
                linear._linear_fwd_kernel, label, arch, dtype, tensors, (), constants, tile,
                (tile.block_m * tile.block_n * tile.block_k, "multiply-add"),
                (f"[{m}, 768] x [768, 3072]", _cost.linear_cost(m, 3072, 768, dtype.itemsize),
                 up(m, tile.block_m) * 3072 * 768),
                has_dot=True,
            )  # fmt: skip


def _bias_activation(arch: int, dtype: torch.dtype, fields: dict[str, int]) -> Iterator[Variant]:
    tensors = dict.fromkeys(("y_ptr", "x_ptr", "bias_ptr"))
    for activation in ACTIVATIONS:
        for tile in changed([bias_activation_tile(3072, arch)], fields):
            constants = {
                "ACTIVATION": activation, "SHORT_ERF": dtype.itemsize == 2, "N": 3072,
                "ROWS": tile.rows, "BLOCK_N": tile.block_n,
            }  # fmt: skip
            yield make_variant(
                linear._bias_activation_fwd_kernel, activation, arch, dtype, tensors, (),
                constants, tile, (tile.rows * tile.block_n, "value"),
                (f"{_ROWS} rows of 3072", _cost.rows_cost(_ROWS, 3072, dtype.itemsize, 2),
                 _ROWS * up(3072, tile.block_n)),
            )  # fmt: skip


def _activation_bwd(arch: int, dtype: torch.dtype, fields: dict[str, int]) -> Iterator[Variant]:
    tensors = {**dict.fromkeys(("dx_ptr", "y_ptr", "dy_ptr", "x_ptr")), "dbias_ptr": "*fp32"}
    for activation in ACTIVATIONS:
        for tile in changed([bias_activation_tile(3072, arch)], fields):
            constants = {
                "ACTIVATION": activation, "SHORT_ERF": dtype.itemsize == 2, "N": 3072,
                "ROWS": tile.rows, "BLOCK_N": tile.block_n,
            }  # fmt: skip
            yield make_variant(
                linear._activation_bwd_kernel, activation, arch, dtype, tensors, (),
                constants, tile, (tile.rows * tile.block_n, "value"),
                (f"{_ROWS} rows of 3072", _cost.rows_cost(_ROWS, 3072, dtype.itemsize, 4),
                 _ROWS * up(3072, tile.block_n)),
            )  # fmt: skip


def _cross_entropy(arch: int, dtype: torch.dtype, fields: dict[str, int]) -> Iterator[Variant]:
    tensors = {**dict.fromkeys(("x_ptr", "bias_ptr")),
               "loss_ptr": "*fp32", "hit_ptr": "*i1", "labels_ptr": "*i64"}  # fmt: skip
    for width in (2, 30522, 119547):
        for tile in changed([cross_entropy_tile(width, arch)], fields):
            padded = -(-width // cross_entropy.PADDED_TO) * cross_entropy.PADDED_TO
            constants = {"N": width, "N_PADDED": padded}
            for gradient in (True, False):
                cost = _cost.rows_cost(1024, width, dtype.itemsize, 2 if gradient else 1)
                yield make_variant(
                    cross_entropy._cross_entropy_kernel,
                    f"V{width} {'with' if gradient else 'without'} gradient", arch, dtype, tensors,
                    (), {**constants, "GRADIENT": gradient, "BLOCK_N": tile.block_n}, tile,
                    (tile.block_n, "value"),
                    (f"1024 rows of {width}", cost, 1024 * up(padded, tile.block_n)),
                )  # fmt: skip


KERNELS = {
    "attention": Kernel(
        "softmax(q k^T * scale + bias) v", attention, "attention_varlen, attention",
        AttentionTile, attention_variants,
    ),
    "attention_bwd": Kernel(
        "gradients of q, k, v and bias", attention_bwd_kernels, "attention_varlen, attention",
        AttentionTile, attention_bwd_variants,
    ),
    "softmax": Kernel("softmax(x * scale + mask) by row", softmax, "softmax", RowTile, _softmax),
    "softmax_bwd": Kernel(
        "gradients of x and mask", softmax, "softmax", RowTile, _softmax_bwd
    ),
    "layernorm": Kernel(
        "norm(dropout(x + bias) + residual)", layernorm, "layer_norm", RowTile, _layernorm
    ),
    "layernorm_bwd": Kernel(
        "gradients of all its inputs; y again", layernorm, "layer_norm, embed", RowTile,
        _layernorm_bwd,
    ),
    "embedding": Kernel(
        "norm(word + position + token type)", embedding, "embed", RowTile, _embedding
    ),
    "linear": Kernel("act(x w^T + bias), one kernel", linear, "linear", GemmTile, _linear),
    "bias_activation": Kernel(
        "act(x + bias) in place, behind a library product", linear, "linear, activate", RowTile,
        _bias_activation,
    ),
    "activation_bwd": Kernel(
        "gradients of x and bias, act(x) again", linear, "feed_forward, linear", RowTile,
        _activation_bwd,
    ),
    "cross_entropy": Kernel(
        "losses of logits, and their gradient in place", cross_entropy, "linear_cross_entropy",
        RowTile, _cross_entropy,
    ),
}  # fmt: skip


def variants(
    kernel: str,
    arch: int,
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32),
    tile: dict[str, int] | None = None,
) -> Iterator[Variant]:
    """Everything that a kernel of `KERNELS` can launch on an architecture for BERT's sizes.

    Args:
        dtypes: bf16 stands for both 16-bit types: they differ in one bit of the instructions.
        tile: fields of the tile to set, others stay as the tables have them.

    Raises:
        ValueError: an unknown kernel, or a field that its tile does not have.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}")
    known = [f.name for f in dataclasses.fields(KERNELS[kernel].tile)]
    for name in tile or ():
        if name not in known:
            raise ValueError(f"tile: {kernel} has {', '.join(known)}; got {name!r}")
    for dtype in dtypes:
        yield from KERNELS[kernel].enumerate(arch, dtype, tile or {})
