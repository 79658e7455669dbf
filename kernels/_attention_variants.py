"""The variants of attention, forward and backward: by what a launch has beside q, k and v, by head
size and by tile."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import _cost, attention, attention_bias_bwd, attention_bwd_kernels
from ._registers import Form, attention_label, limited_for
from ._tiles import attention_bwd_tiles_of, attention_tiles
from ._variant import Variant, changed, make_variant, up

__all__ = ["attention_bwd_variants", "attention_variants"]


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
    forms = {
        Form(packed=True): (*packed, (16, 32, 64, 96, 128), {}),
        Form(packed=True, bias=True): (*packed_biased, own, {}),
        Form(packed=False, mask=True): (*masked, bert if backward else (32, 64, 128), {}),
        Form(packed=False, mask=True, bias=True): (*biased, own, {}),
    }
    for form, head_dims, bits in (
        (Form(packed=True), own, 8),
        (Form(packed=True), bert, 16),
        (Form(packed=False, mask=True), () if backward else bert, 8),
        (Form(packed=False, mask=True, bias=True), own, 8),
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


def attention_variants(arch: int, dtype: torch.dtype, fields: dict[str, int]) -> Iterator[Variant]:
    tensors = dict.fromkeys(("out_ptr", "q_ptr", "k_ptr", "v_ptr"))
    tensors["lse_ptr"] = "*fp32"
    kernel = attention._attention_fwd_kernel
    for form, (extra, none, head_dims, also) in _attention_forms(dtype).items():
        for head_dim in head_dims:
            tiles = attention_tiles(arch, dtype, head_dim, "bias_ptr" in extra)
            for tile in changed(tiles, fields):
                tile = limited_for(tile, kernel, arch, dtype, head_dim, form)
                constants = {
                    "HEAD_DIM": head_dim, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
                    "BLOCK_D": tile.block_d, "SINGLE": tile.single,
                    "RELOAD_Q": dtype == torch.float32, "INPUT_PRECISION": "ieee",
                    "DROPOUT_BITS": 0, **also,
                }  # fmt: skip
                length = min(tile.block_n, 128) if tile.single else 512
                cost = _cost.attention_cost([length] * 64, 12, head_dim, dtype.itemsize)
                count = 64 * 12 * up(length, tile.block_m) * up(length, tile.block_n)
                label = attention_label(kernel, head_dim, tile, form)
                uses = {"": none}
                if not form.dropout_bits:
                    uses[", inference"] = (*none, "lse_ptr")
                for use, absent in uses.items():
                    yield make_variant(
                        kernel, label + use, arch, dtype, {**tensors, **extra}, absent, constants,
                        tile, (tile.block_m * tile.block_n, "score"),
                        (f"64 sequences of {length}, 12 heads", cost, count), has_dot=True,
                    )  # fmt: skip


def attention_bwd_variants(
    arch: int, dtype: torch.dtype, fields: dict[str, int]
) -> Iterator[Variant]:
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
                for tile in changed(tiles, fields):
                    tile = limited_for(tile, kernel, arch, dtype, head_dim, form)
                    constants = {
                        "HEAD_DIM": head_dim, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
                        "BLOCK_D": tile.block_d, "INPUT_PRECISION": "ieee", "DROPOUT_BITS": 0,
                        **only[part], **also,
                    }  # fmt: skip
                    pointers = {**tensors, **extra, "dbias_ptr": "*fp32"}
                    length = tile.block_m if part == "whole" else 512
                    cost = _cost.attention_bwd_cost([length] * 64, 12, head_dim, dtype.itemsize)
                    count = 64 * 12 * up(length, tile.block_m) * up(length, tile.block_n)
                    yield make_variant(
                        kernel, attention_label(kernel, head_dim, tile, form), arch, dtype,
                        {n: t for n, t in pointers.items() if n in names},
                        [n for n in none if n in names],
                        constants, tile, (tile.block_m * tile.block_n, "score"),
                        (f"64 sequences of {length}, 12 heads, all of backward", cost, count),
                        has_dot=True,
                    )  # fmt: skip
