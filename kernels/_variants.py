"""Everything that can be launched: each kernel with what the compiler specialises it on.

`KERNELS` is the one list of kernels. An entry says what a kernel computes, which op launches it,
and enumerates its `Variant`s for an architecture: all tiles that the tables can choose, or a tile
that is given. The compile test, ``fastbert kernels`` and the tuner see what is listed here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from . import (
    _cost,
    _sums,
    attention,
    attention_bias_bwd,
    attention_bwd_kernels,
    cross_entropy,
    embedding,
    layernorm,
    linear,
    softmax,
)
from ._common import ACTIVATIONS
from ._cost import Cost
from ._registers import TYPE_NAMES, Form, attention_label, limited_for, variant_name
from ._tiles import (
    AttentionTile,
    GemmTile,
    RowTile,
    attention_bwd_tiles_of,
    attention_tiles,
    bias_activation_tile,
    cross_entropy_tile,
    gemm_tile,
    layernorm_bwd_tile,
    layernorm_tile,
    softmax_tile,
)

__all__ = ["KERNELS", "Kernel", "Variant", "variants"]

Tile = AttentionTile | GemmTile | RowTile


@dataclass(frozen=True)
class Variant:
    """A kernel with everything the compiler specialises on. Pointers are 16-byte aligned.

    Attributes:
        has_dot: a product of 16-bit values is in it, which has to reach the matrix units.
        elements: values of ``element`` that one program handles in a step of its inner loop, or in
            all if it has no loop.
        example, cost: a typical problem in words, and its least work.
        count: elements in it, those that pad tiles included.
    """

    name: str
    kernel: object
    arch: int
    dtype: torch.dtype
    signature: dict[str, str]
    constants: dict[str, object]
    tile: Tile
    has_dot: bool
    elements: int
    element: str
    example: str
    cost: Cost
    count: float

    @property
    def num_warps(self) -> int:
        return self.tile.num_warps

    @property
    def num_stages(self) -> int:
        return getattr(self.tile, "num_stages", 3)

    @property
    def max_registers(self) -> int | None:
        """Of a thread; None for as many as ptxas likes."""
        return getattr(self.tile, "max_registers", None)


@dataclass(frozen=True)
class Kernel:
    """A kernel for people and tools: what it is, where it is, and its variants."""

    computes: str
    module: object
    op: str
    tile: type
    enumerate: Callable[[int, torch.dtype, dict[str, int]], Iterator[Variant]]


def _signature(kernel, pointers: dict[str, str], constants: dict[str, object]) -> dict[str, str]:
    """Types of all arguments: given for pointers, fp32 for scalars of the mathematics, else i32."""
    scalars = dict.fromkeys(("scale", "scale_log2", "dropout_scale", "eps", "smoothing"), "fp32")
    return {
        name: pointers.get(name) or scalars.get(name, "i32")
        for name in kernel.arg_names
        if name not in constants
    }


def _variant(
    kernel, label, arch, dtype, pointers, none, constants, tile, elements, example, *, has_dot=False
):  # fmt: skip
    constants = {**dict.fromkeys(none), **constants}
    value = f"*{TYPE_NAMES[dtype]}"
    pointers = {name: kind or value for name, kind in pointers.items()}
    return Variant(
        name=variant_name(kernel, arch, dtype, label),
        kernel=kernel,
        arch=arch,
        dtype=dtype,
        signature=_signature(kernel, pointers, constants),
        constants=constants,
        tile=tile,
        has_dot=has_dot and dtype.itemsize == 2,
        elements=elements[0],
        element=elements[1],
        example=example[0],
        cost=example[1],
        count=float(example[2]),
    )


def _up(size: int, block: int) -> int:
    """The multiple of a block that holds this size."""
    return -(-size // block) * block


def _changed(tiles: list[Tile], fields: dict[str, int]) -> list[Tile]:
    """The tiles of the tables, or what remains of them with some fields set."""
    return list(dict.fromkeys(dataclasses.replace(tile, **fields) for tile in tiles))


def _attention_forms(dtype: torch.dtype, backward: bool = False) -> dict[Form, tuple]:
    """What is there besides q, k and v, what not, for which head sizes, what else is constant.

    One head size for each row of the tables and one between them; backward has four kernels for
    each and leaves out forms that another one contains but for BERT's own head size.
    """
    maps = ("cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "tile_map_ptr")
    packed = (dict.fromkeys(maps, "*i32"), ("key_mask_ptr", "bias_ptr", "seed_ptr"))
    packed_biased = ({**packed[0], "bias_ptr": None}, ("key_mask_ptr", "seed_ptr"))
    masked = ({"key_mask_ptr": "*i1"}, (*maps, "bias_ptr", "seed_ptr"))
    biased = ({"key_mask_ptr": "*i1", "bias_ptr": None}, (*maps, "seed_ptr"))
    own, bert = (16, 32, 64, 128), (64,)
    # The compiler takes a stride of 1 as a constant.
    forms = {
        Form(packed=True): (*packed, (16, 32, 64, 96, 128), {}),
        Form(packed=True, bias="bias"): (*packed_biased, own, {"stride_bias_k": 1}),
        Form(packed=False, mask=True): (*masked, bert if backward else (32, 64, 128), {}),
        Form(packed=False, mask=True, bias="bias"): (*biased, bert, {"stride_bias_k": 1}),
        Form(packed=False, mask=True, bias="bias per query"): (*biased, own, {}),
    }
    for form, head_dims, bits in (
        (Form(packed=True), own, 8),
        (Form(packed=True), bert, 16),
        (Form(packed=False, mask=True), () if backward else bert, 8),
        (Form(packed=False, mask=True, bias="bias per query"), own, 8),
    ):
        extra, none = forms[form][:2]
        none = tuple(name for name in none if name != "seed_ptr")
        extra = {**extra, "seed_ptr": "*i64"}
        forms[form._replace(dropout_bits=bits)] = (extra, none, head_dims, {"DROPOUT_BITS": bits})
    if dtype == torch.float32:
        forms[Form(packed=True, precision="tf32")] = (
            *packed,
            (64, 128),
            {"INPUT_PRECISION": "tf32"},
        )
    return forms


def _attention(arch: int, dtype: torch.dtype, fields: dict[str, int]) -> Iterator[Variant]:
    tensors = dict.fromkeys(("out_ptr", "q_ptr", "k_ptr", "v_ptr"))
    tensors["lse_ptr"] = "*fp32"
    kernel = attention._attention_fwd_kernel
    for form, (extra, none, head_dims, also) in _attention_forms(dtype).items():
        for head_dim in head_dims:
            tiles = attention_tiles(arch, dtype, head_dim, "bias_ptr" in extra)
            for tile in _changed(tiles, fields):
                tile = limited_for(tile, kernel, arch, dtype, head_dim, form)
                constants = {
                    "HEAD_DIM": head_dim, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
                    "BLOCK_D": tile.block_d, "SINGLE": tile.single,
                    "RELOAD_Q": dtype == torch.float32, "INPUT_PRECISION": "ieee",
                    "DROPOUT_BITS": 0, **also,
                }  # fmt: skip
                length = min(tile.block_n, 128) if tile.single else 512
                cost = _cost.attention_cost([length] * 64, 12, head_dim, dtype.itemsize)
                count = 64 * 12 * _up(length, tile.block_m) * _up(length, tile.block_n)
                yield _variant(
                    kernel, attention_label(kernel, head_dim, tile, form), arch, dtype,
                    {**tensors, **extra}, none, constants, tile,
                    (tile.block_m * tile.block_n, "score"),
                    (f"64 sequences of {length}, 12 heads", cost, count), has_dot=True,
                )  # fmt: skip


def _attention_bwd(arch: int, dtype: torch.dtype, fields: dict[str, int]) -> Iterator[Variant]:
    rows = ("dq_ptr", "dk_ptr", "dv_ptr", "do_ptr", "out_ptr", "q_ptr", "k_ptr", "v_ptr")
    tensors = {**dict.fromkeys(rows), **dict.fromkeys(("lse_ptr", "pairs_ptr"), "*fp32")}
    kernels = {
        "whole": attention_bwd_kernels._attention_bwd_kernel_whole,
        "dq": attention_bwd_kernels._attention_bwd_kernel_dq,
        "dkdv": attention_bwd_kernels._attention_bwd_kernel_dkdv,
        "bias": attention_bias_bwd._attention_bwd_kernel_bias,
    }
    reload = {"RELOAD": dtype == torch.float32}
    sums = {"SUM_SEQUENCES": True, "SUM_HEADS": False}
    only = {"whole": {}, "dq": reload, "dkdv": reload, "bias": sums}
    for form, (extra, none, head_dims, also) in _attention_forms(dtype, backward=True).items():
        for head_dim in head_dims:
            for part, kernel in kernels.items():
                if part == "bias" and "bias_ptr" not in extra:
                    continue
                names = kernel.arg_names
                tiles = attention_bwd_tiles_of(
                    part, arch, dtype, head_dim, "bias_ptr" in extra, also.get("DROPOUT_BITS", 0)
                )
                for tile in _changed(tiles, fields):
                    tile = limited_for(tile, kernel, arch, dtype, head_dim, form)
                    constants = {
                        "HEAD_DIM": head_dim, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
                        "BLOCK_D": tile.block_d, "INPUT_PRECISION": "ieee", "DROPOUT_BITS": 0,
                        **only[part], **also,
                    }  # fmt: skip
                    pointers = {**tensors, **extra, "dbias_ptr": "*fp32"}
                    length = tile.block_m if part == "whole" else 512
                    cost = _cost.attention_bwd_cost([length] * 64, 12, head_dim, dtype.itemsize)
                    count = 64 * 12 * _up(length, tile.block_m) * _up(length, tile.block_n)
                    yield _variant(
                        kernel, attention_label(kernel, head_dim, tile, form), arch, dtype,
                        {n: t for n, t in pointers.items() if n in names},
                        [n for n in none if n in names],
                        constants, tile, (tile.block_m * tile.block_n, "score"),
                        (f"64 sequences of {length}, 12 heads, all of backward", cost, count),
                        has_dot=True,
                    )  # fmt: skip


_ROWS = 32768
_WIDTHS = (32, 384, 768, 1024, 4096, 8192)


def _layernorm(arch: int, dtype: torch.dtype, fields: dict[str, int]) -> Iterator[Variant]:
    rows = ("y_ptr", "x_ptr", "residual_ptr", "input_bias_ptr", "weight_ptr", "bias_ptr")
    tensors = {**dict.fromkeys(rows), "mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
    training = {**tensors, "z_ptr": None, "seed_ptr": "*i64"}
    forms = {  # what there is, what not
        "residual and bias": (tensors, ("z_ptr", "seed_ptr")),
        "plain": (tensors, ("z_ptr", "seed_ptr", "residual_ptr", "input_bias_ptr")),
        "residual, bias, dropout, sum": (training, ()),
    }
    for width in _WIDTHS:
        for tile in _changed([layernorm_tile(width, arch)], fields):
            constants = {"N": width, "ROWS": tile.rows, "BLOCK_N": tile.block_n}
            for form, (given, none) in forms.items():
                cost = _cost.layernorm_cost(
                    _ROWS, width, dtype.itemsize, residual=form != "plain", keep_sum=not none
                )
                yield _variant(
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
        for tile in _changed([layernorm_bwd_tile(width, arch)], fields):
            constants = {
                "N": width, "ROWS": tile.rows, "BLOCK_N": tile.block_n,
                "STAGES": layernorm.stages(tile.block_n),
            }  # fmt: skip
            work = (tile.rows * tile.block_n, "value")
            for form, (extra, none) in forms.items():
                cost = _cost.layernorm_bwd_cost(
                    _ROWS, width, dtype.itemsize, residual=form == "dropout"
                )
                yield _variant(
                    layernorm._layernorm_bwd_kernel, f"N{width} {form}", arch, dtype,
                    {**tensors, **extra}, none, constants, tile, work,
                    (f"{_ROWS} rows of {width}", cost, _ROWS * tile.block_n),
                )  # fmt: skip
        yield _variant(
            _sums._column_sums_kernel, f"N{width}", arch, dtype,
            {"out_ptr": None, "shares_ptr": "*fp32"}, (),
            {"N": width, "ROWS": _sums.ROWS, "BLOCK_N": _sums.BLOCK_N},
            RowTile(_sums.ROWS, _sums.BLOCK_N, 4), (_sums.ROWS * _sums.BLOCK_N, "value"),
            (f"1056 shares of {width}", _cost.rows_cost(1056, width, 4, 1),
             _up(1056, _sums.ROWS) * _up(width, _sums.BLOCK_N)),
        )  # fmt: skip
        for tile in _changed([layernorm_tile(width, arch)], fields):
            yield _variant(
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
        for tile in _changed([layernorm_tile(width, arch)], fields):
            constants = {"N": width, "ROWS": tile.rows, "BLOCK_N": tile.block_n}
            for form, none in (("", ("z_ptr",)), (" sum", ())):
                yield _variant(
                    embedding._embedding_fwd_kernel, f"N{width}{form}", arch, dtype,
                    {**tensors, "z_ptr": None}, none, constants,
                    tile, (tile.rows * tile.block_n, "value"),
                    (f"{_ROWS} tokens", _cost.embedding_cost(_ROWS, width, dtype.itemsize),
                     _ROWS * tile.block_n),
                )  # fmt: skip


def _softmax(arch: int, dtype: torch.dtype, fields: dict[str, int]) -> Iterator[Variant]:
    tensors = dict.fromkeys(("y_ptr", "x_ptr"))
    for width in (16, 128, 512, 8192):
        for tile in _changed([softmax_tile(width, arch)], fields):
            # The compiler takes a stride of 1 as a constant.
            constants = {"ROWS": tile.rows, "BLOCK_N": tile.block_n, "stride_mask_n": 1}
            for kind, is_bool in ((None, False), ("*i1", True)):
                yield _variant(
                    softmax._softmax_fwd_kernel,
                    f"N{width} {'bool' if is_bool else 'additive'} mask", arch, dtype,
                    {**tensors, "mask_ptr": kind}, (), {**constants, "IS_BOOL": is_bool}, tile,
                    (tile.rows * tile.block_n, "value"),
                    (f"{_ROWS} rows of {width}",
                     _cost.rows_cost(_ROWS, width, dtype.itemsize, 2), _ROWS * tile.block_n),
                )  # fmt: skip


def _softmax_bwd(arch: int, dtype: torch.dtype, fields: dict[str, int]) -> Iterator[Variant]:
    for width in (16, 128, 512, 8192):
        for tile in _changed([softmax_tile(width, arch)], fields):
            yield _variant(
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
        for tile in _changed([gemm_tile(m=m, dtype=dtype, arch=arch)], fields):
            constants = {
                "ACTIVATION": activation, "SHORT_ERF": dtype.itemsize == 2, "N": 3072, "K": 768,
                "INPUT_PRECISION": precision, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m,
            }  # fmt: skip
            label = f"{activation} {tile.block_m}x{tile.block_n}x{tile.block_k} {precision}"
            yield _variant(
                linear._linear_fwd_kernel, label, arch, dtype, tensors, (), constants, tile,
                (tile.block_m * tile.block_n * tile.block_k, "multiply-add"),
                (f"[{m}, 768] x [768, 3072]", _cost.linear_cost(m, 3072, 768, dtype.itemsize),
                 _up(m, tile.block_m) * 3072 * 768),
                has_dot=True,
            )  # fmt: skip


def _bias_activation(arch: int, dtype: torch.dtype, fields: dict[str, int]) -> Iterator[Variant]:
    tensors = dict.fromkeys(("y_ptr", "x_ptr", "bias_ptr"))
    for activation in ACTIVATIONS:
        for tile in _changed([bias_activation_tile(3072, arch)], fields):
            constants = {
                "ACTIVATION": activation, "SHORT_ERF": dtype.itemsize == 2, "N": 3072,
                "ROWS": tile.rows, "BLOCK_N": tile.block_n,
            }  # fmt: skip
            yield _variant(
                linear._bias_activation_fwd_kernel, activation, arch, dtype, tensors, (),
                constants, tile, (tile.rows * tile.block_n, "value"),
                (f"{_ROWS} rows of 3072", _cost.rows_cost(_ROWS, 3072, dtype.itemsize, 2),
                 _ROWS * _up(3072, tile.block_n)),
            )  # fmt: skip


def _activation_bwd(arch: int, dtype: torch.dtype, fields: dict[str, int]) -> Iterator[Variant]:
    tensors = {**dict.fromkeys(("dx_ptr", "y_ptr", "dy_ptr", "x_ptr")), "dbias_ptr": "*fp32"}
    for activation in ACTIVATIONS:
        for tile in _changed([bias_activation_tile(3072, arch)], fields):
            constants = {
                "ACTIVATION": activation, "SHORT_ERF": dtype.itemsize == 2, "N": 3072,
                "ROWS": tile.rows, "BLOCK_N": tile.block_n,
            }  # fmt: skip
            yield _variant(
                linear._activation_bwd_kernel, activation, arch, dtype, tensors, (),
                constants, tile, (tile.rows * tile.block_n, "value"),
                (f"{_ROWS} rows of 3072", _cost.rows_cost(_ROWS, 3072, dtype.itemsize, 4),
                 _ROWS * _up(3072, tile.block_n)),
            )  # fmt: skip


def _cross_entropy(arch: int, dtype: torch.dtype, fields: dict[str, int]) -> Iterator[Variant]:
    tensors = {**dict.fromkeys(("x_ptr", "bias_ptr")),
               "loss_ptr": "*fp32", "hit_ptr": "*i1", "labels_ptr": "*i64"}  # fmt: skip
    for width in (2, 30522, 119547):
        for tile in _changed([cross_entropy_tile(width, arch)], fields):
            padded = -(-width // cross_entropy.PADDED_TO) * cross_entropy.PADDED_TO
            constants = {"N": width, "N_PADDED": padded}
            for gradient in (True, False):
                cost = _cost.rows_cost(1024, width, dtype.itemsize, 2 if gradient else 1)
                yield _variant(
                    cross_entropy._cross_entropy_kernel,
                    f"V{width} {'with' if gradient else 'without'} gradient", arch, dtype, tensors,
                    (), {**constants, "GRADIENT": gradient, "BLOCK_N": tile.block_n}, tile,
                    (tile.block_n, "value"),
                    (f"1024 rows of {width}", cost, 1024 * _up(padded, tile.block_n)),
                )  # fmt: skip


KERNELS = {
    "attention": Kernel(
        "softmax(q k^T * scale + bias) v", attention, "attention_varlen, attention",
        AttentionTile, _attention,
    ),
    "attention_bwd": Kernel(
        "gradients of q, k, v and bias", attention_bwd_kernels, "attention_varlen, attention",
        AttentionTile, _attention_bwd,
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
