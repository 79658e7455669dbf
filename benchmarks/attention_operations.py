"""Attention as operations of the benchmarks: ours on packed rows, that of others on padded ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from fastbert.kernels import _cost
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbert import ops
from fastbert.ops.reference import attention_ref
from fastbert.packing import PackedBatch

from .operations import COMPILED, EAGER, Function, Inputs, Op, compiled, eager, needs, normals
from .shapes import draw_lengths
from .workload import Unavailable

__all__ = [
    "ATTENTION", "ATTENTION_BIAS", "ATTENTION_BY_PLACE", "FLASH_ATTN", "SDPA", "VARLEN",
    "padded_views",
]  # fmt: skip

VARLEN, FLASH_ATTN = "torch varlen_attn", "flash-attn"
SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


def _make_attention(p: dict, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    b, s, h, d = p["B"], p["S"], p["H"], p["D"]
    lengths = draw_lengths(p.get("lengths", "fixed"), b, s)
    draw = normals(device, seed)
    qkv = draw(b, s, 3, h, d).to(dtype)
    keep = (torch.arange(s) < torch.tensor(lengths)[:, None]).to(device)
    inputs = {"keep": None if bool(keep.all()) else keep, "lengths": lengths, "qkv": qkv[keep]}
    inputs |= {name: qkv[:, :, i].transpose(1, 2) for i, name in enumerate("qkv")}
    inputs["batch"] = PackedBatch.from_lengths(lengths, device=device)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    inputs["cu_seqlens"], inputs["longest"] = cu, max(lengths)
    if p.get("bias"):
        inputs["bias"] = draw(1, h, s, s).to(dtype)
    return inputs


def _packed(x: Inputs) -> tuple[Tensor, ...]:
    return x["qkv"].unbind(1)


def _padded(x: Inputs) -> tuple[Tensor, ...]:
    return x["q"], x["k"], x["v"]


def _attention_ref(x: Inputs) -> Tensor:
    return attention_ref(*_padded(x), x["keep"], x.get("bias"))


def _attention_oracle(x: Inputs) -> Tensor:
    """One sequence after the other: the scores of a long batch in fp64 fill a GPU."""
    parts = [
        attention_ref(
            *(t[i : i + 1] for t in _padded(x)),
            None if x["keep"] is None else x["keep"][i : i + 1],
            x.get("bias"),
        )
        for i in range(len(x["lengths"]))
    ]
    return torch.cat(parts)


def _attention_ours(x: Inputs) -> Tensor:
    return ops.attention_qkv(x["qkv"], x["batch"])


def _attention_bias_ours(x: Inputs) -> Tensor:
    return ops.attention(*_padded(x), key_mask=x["keep"], bias=x["bias"])


def _attention_by_place_ours(x: Inputs) -> Tensor:
    bias = x["bias"][0, :, : x["longest"], : x["longest"]]
    return ops.attention_qkv(x["qkv"], x["batch"], bias=bias)


def _sdpa(backend: SDPBackend) -> Callable[[str], Function]:
    def run(x: Inputs) -> Tensor:
        mask = x.get("bias")
        if x["keep"] is not None:
            keep = x["keep"][:, None, None, :]
            mask = keep if mask is None else mask.masked_fill(~keep, -torch.inf)
        with sdpa_kernel(backend):
            try:
                return F.scaled_dot_product_attention(*_padded(x), attn_mask=mask)
            except RuntimeError as error:
                if "No available kernel" in str(error) or "No viable backend" in str(error):
                    raise Unavailable("this backend of sdpa does not take this case") from None
                raise

    return eager(run)


def _varlen_attn(device: str) -> Function:
    if device != "cuda":
        raise Unavailable("varlen_attn needs a GPU")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise Unavailable("this torch has no varlen_attn") from None

    def run(x: Inputs) -> Tensor:
        cu, longest = x["cu_seqlens"], x["longest"]
        return varlen_attn(*_packed(x), cu, cu, longest, longest)

    return run


def _flash_attn(device: str) -> Function:
    needs("flash_attn", device)
    from flash_attn import flash_attn_varlen_func

    def run(x: Inputs) -> Tensor:
        cu, longest = x["cu_seqlens"], x["longest"]
        return flash_attn_varlen_func(*_packed(x), cu, cu, longest, longest)

    return run


def _attention_rows(x: Inputs, out: Tensor) -> Tensor:
    """Padded outputs ``[B, H, S, D]`` as packed rows ``[T, H, D]``."""
    if out.dim() == 3:
        return out
    out = out.transpose(1, 2)
    return out.flatten(0, 1) if x["keep"] is None else out[x["keep"]]


def _attention_cost(p: dict, itemsize: int):
    lengths = draw_lengths(p.get("lengths", "fixed"), p["B"], p["S"])
    values = p["H"] * max(lengths) ** 2 if p.get("bias") else 0
    sizes = (p["H"], p["D"], itemsize)
    forward = _cost.attention_cost(lengths, *sizes, bias_bytes=values * itemsize)
    both = values * (itemsize + 4)  # the gradient is summed in fp32
    return forward, _cost.attention_bwd_cost(lengths, *sizes, bias_bytes=both)


_SDPA = {name: _sdpa(backend) for name, backend in SDPA.items()}
ATTENTION = Op(
    make=_make_attention,
    reference=_attention_ref,
    ours=_attention_ours,
    others={
        EAGER: eager(_attention_ref),
        COMPILED: compiled(_attention_ref),
        **_SDPA,
        VARLEN: _varlen_attn,
        FLASH_ATTN: _flash_attn,
    },
    leaves=("qkv",),
    cost=_attention_cost,
    rows=_attention_rows,
    oracle=_attention_oracle,
)
ATTENTION_BIAS = Op(
    make=_make_attention,
    reference=_attention_ref,
    ours=_attention_bias_ours,
    others={EAGER: eager(_attention_ref), COMPILED: compiled(_attention_ref), **_SDPA},
    leaves=("q", "k", "v"),
    cost=_attention_cost,
    rows=_attention_rows,
    oracle=_attention_oracle,
)
# Packed sequences have one bias for all, by places in a sequence.
ATTENTION_BY_PLACE = replace(ATTENTION_BIAS, ours=_attention_by_place_ours, leaves=("qkv", "bias"))


def padded_views(x: Inputs) -> Inputs:
    """q, k and v ``[B, H, S, D]`` that pass their gradients on to the packed leaf."""
    qkv, keep = x["qkv"], x["keep"]
    if keep is None:
        padded = qkv.unflatten(0, (len(x["lengths"]), -1))
    else:
        padded = qkv.new_zeros(*keep.shape, *qkv.shape[1:]).index_put((keep,), qkv)
    return {name: padded[:, :, i].transpose(1, 2) for i, name in enumerate("qkv")}
