"""How many registers a thread of attention may have, where fewer make room for another program.

ptxas hands out registers without asking how many programs then fit a multiprocessor. A kernel of
eight warps that takes 130 is alone there, so that two warps of each scheduler have to hide what
they wait for; of kernels with 128 there are two. `TWO_PROGRAMS` names the variants that can do with
that many, without a stack and with at most a twentieth more instructions in their inner loop. They
were found by compiling: ``fastbert kernels screen`` refuses one that could be here and is not, and
one that is here and needs a stack. A few are here for one of two compilers alone, which would give
them fewer by itself, and a stack, or leave them alone. `PROGRAMS` has others, with how many are to
fit: one more than there would be, or as many as need no stack. **Not timed on a GPU.**
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from ._cards import LIMITS
from ._device import device_arch
from ._tiles import AttentionTile, _remember

__all__ = [
    "ONE_PROGRAM", "PROGRAMS", "TWO_PROGRAMS", "TYPE_NAMES", "Form", "attention_label",
    "limited", "limited_for", "listed_as", "registers_for", "variant_name",
]  # fmt: skip

TYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_REGISTERS = LIMITS[80].registers  # of a multiprocessor, of every architecture
_UNIT = 8  # registers of a thread are handed out in this many


class Form(NamedTuple):
    """What a launch of attention has beside q, k and v, which is what its code depends on.

    Attributes:
        packed: sequences lie behind each other.
        mask: of keys.
        bias: of scores.
        dropout_bits: of one draw; 0 without dropout.
        precision: of fp32 products.
    """

    packed: bool
    mask: bool = False
    bias: bool = False
    dropout_bits: int = 0
    precision: str = "ieee"

    def __str__(self) -> str:
        text = "packed" if self.packed else "padded"
        if beside := " and ".join(filter(None, ("mask" * self.mask, "bias" * self.bias))):
            text += f", {beside}"
        if self.dropout_bits:
            text += f", dropout {self.dropout_bits} bit"
        return text if self.precision == "ieee" else f"{text}, {self.precision}"


def variant_name(kernel, arch: int, dtype: torch.dtype, label: str) -> str:
    """What a variant is called, here and in everything that the workbench prints."""
    return f"{kernel.__name__.strip('_')} sm_{arch} {TYPE_NAMES[dtype]} {label}"


def listed_as(name: str) -> str:
    """The name by which the lists below have a variant: sm_89 stands for sm_86, whose tiles it
    has."""
    return name.replace(" sm_86 ", " sm_89 ")


def attention_label(kernel, head_dim: int, tile: AttentionTile, form: Form) -> str:
    """What tells a variant of a kernel of attention from others."""
    step = ""
    if "fwd" in kernel.__name__:
        step = " single" if tile.single else " online"
    return f"D{head_dim} {tile.block_m}x{tile.block_n}{step} {form}"


def registers_for(programs: int, num_warps: int) -> int:
    """Most registers of a thread with which this many programs of so many warps fit."""
    return min(255, _REGISTERS // (programs * 32 * num_warps) // _UNIT * _UNIT)


def limited(
    tile: AttentionTile,
    kernel,
    q: torch.Tensor,
    key_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    dropout_bits: int,
    precision: str,
) -> AttentionTile:
    """The tile as a launch of a kernel on these tensors has it.

    Args:
        q: packed, ``[T, H, D]``, or padded, ``[B, H, S, D]``.
    """
    form = Form(q.dim() == 3, key_mask is not None, bias is not None, dropout_bits, precision)
    return limited_for(tile, kernel, device_arch(q.device), q.dtype, q.shape[-1], form)


@_remember
def limited_for(
    tile: AttentionTile, kernel, arch: int, dtype: torch.dtype, head_dim: int, form: Form
) -> AttentionTile:
    """The tile with a limit of registers where `TWO_PROGRAMS` or `PROGRAMS` has the variant,
    else as it is.

    bf16 stands for both 16-bit types.
    """
    known = torch.bfloat16 if dtype == torch.float16 else dtype
    label = attention_label(kernel, head_dim, tile, form)
    name = listed_as(variant_name(kernel, arch, known, label))
    programs = 2 if name in TWO_PROGRAMS else PROGRAMS.get(name)
    if tile.max_registers is not None or programs is None:
        return tile
    return dataclasses.replace(tile, max_registers=registers_for(programs, tile.num_warps))


TWO_PROGRAMS = frozenset(
    """
attention_bwd_kernel_bias sm_80 fp32 D128 32x32 padded, mask and bias
attention_bwd_kernel_bias sm_90 bf16 D16 64x64 padded, mask and bias
attention_bwd_kernel_bias sm_90 bf16 D16 64x64 padded, mask and bias, dropout 8 bit
attention_bwd_kernel_bias sm_90 bf16 D32 64x64 padded, mask and bias, dropout 8 bit
attention_bwd_kernel_dkdv sm_80 bf16 D16 64x128 packed
attention_bwd_kernel_dkdv sm_89 bf16 D16 64x128 packed
attention_bwd_kernel_dkdv sm_89 bf16 D16 64x128 packed, dropout 8 bit
attention_bwd_kernel_dkdv sm_90 fp32 D128 16x16 padded, mask and bias
attention_bwd_kernel_dkdv sm_90 fp32 D128 32x16 packed, tf32
attention_bwd_kernel_dq sm_80 bf16 D32 128x64 packed
attention_bwd_kernel_dq sm_80 fp32 D32 16x32 packed, bias
attention_bwd_kernel_dq sm_80 fp32 D32 16x32 packed, dropout 8 bit
attention_bwd_kernel_dq sm_80 fp32 D32 16x32 padded, mask and bias, dropout 8 bit
attention_bwd_kernel_dq sm_80 fp32 D64 32x32 packed, tf32
attention_bwd_kernel_dq sm_89 bf16 D32 128x64 packed
attention_bwd_kernel_dq sm_89 fp32 D32 16x32 packed, dropout 8 bit
attention_bwd_kernel_dq sm_89 fp32 D64 32x32 packed, tf32
attention_bwd_kernel_dq sm_90 fp32 D32 16x32 padded, mask and bias, dropout 8 bit
attention_bwd_kernel_whole sm_80 bf16 D128 64x64 packed, bias
attention_bwd_kernel_whole sm_80 bf16 D128 64x64 padded, mask and bias, dropout 8 bit
attention_bwd_kernel_whole sm_80 bf16 D96 64x64 packed
attention_bwd_kernel_whole sm_80 fp32 D128 16x32 packed, bias
attention_bwd_kernel_whole sm_80 fp32 D128 16x32 padded, mask and bias
attention_bwd_kernel_whole sm_89 bf16 D16 128x128 packed
attention_bwd_kernel_whole sm_90 fp32 D128 16x32 packed, bias
attention_bwd_kernel_whole sm_90 fp32 D128 16x32 padded, mask and bias
attention_fwd_kernel sm_80 bf16 D32 128x64 online packed, dropout 8 bit
attention_fwd_kernel sm_89 bf16 D32 128x64 online packed, dropout 8 bit
attention_fwd_kernel sm_90 bf16 D64 128x64 online packed, dropout 16 bit
attention_fwd_kernel sm_90 bf16 D64 128x64 online packed, dropout 8 bit
attention_fwd_kernel sm_90 bf16 D64 128x64 online padded, mask, dropout 8 bit
attention_fwd_kernel sm_90 fp32 D128 32x16 online padded, mask
attention_fwd_kernel sm_90 fp32 D128 32x16 online padded, mask and bias
""".strip().splitlines()
)

PROGRAMS = {
    "attention_bwd_kernel_bias sm_89 fp32 D128 16x32 padded, mask and bias": 2,
    "attention_bwd_kernel_bias sm_90 fp32 D32 32x32 padded, mask and bias, dropout 8 bit": 2,
    "attention_bwd_kernel_dq sm_90 bf16 D64 64x64 packed, dropout 16 bit": 3,
    "attention_bwd_kernel_dq sm_90 bf16 D64 64x64 packed, dropout 8 bit": 3,
    "attention_fwd_kernel sm_80 bf16 D16 64x128 single padded, mask and bias": 4,
    "attention_fwd_kernel sm_80 fp32 D16 16x32 online packed, bias": 5,
    "attention_fwd_kernel sm_89 fp32 D128 16x32 online padded, mask and bias": 3,
    "attention_fwd_kernel sm_90 bf16 D32 64x64 online packed, dropout 8 bit": 4,
}

# Would fit with the compiler of triton 3.7 and not with that of 3.6, or the other way round: 8 or
# 16 bytes of stack, or (tf32) 5.4 % more instructions.
ONE_PROGRAM = frozenset(
    """
attention_bwd_kernel_bias sm_80 fp32 D128 32x32 padded, mask and bias, dropout 8 bit
attention_bwd_kernel_dkdv sm_80 fp32 D128 32x16 packed, tf32
attention_bwd_kernel_dq sm_80 bf16 D32 128x64 packed, dropout 8 bit
attention_bwd_kernel_dq sm_89 bf16 D32 128x64 packed, dropout 8 bit
attention_bwd_kernel_whole sm_80 bf16 D128 64x64 padded, mask and bias
""".strip().splitlines()
)
