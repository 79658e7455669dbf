"""Compiling kernels for GPUs that are not here, and reading what came out.

    python -m fastbert.kernels._screen [--arch 80 89 90] [--kernel NAME]

`screen` compiles one variant of a kernel ahead of time and reports registers, stack, shared
memory, matrix instructions and what ptxas had to say, all read from the compiled artefact.
`variants` lists every variant that the tile tables can launch for BERT's sizes. A variant is fit
to ship when `faults` finds nothing.
Must run in a process where Triton does not interpret: interpreted functions cannot be compiled.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import attention, embedding, layernorm, linear, softmax
from ._common import ACTIVATIONS
from ._tiles import (
    ARCHITECTURES,
    attention_tiles,
    bias_activation_tile,
    gemm_tile,
    layernorm_tile,
    softmax_tile,
)

__all__ = ["Resources", "Variant", "faults", "screen", "variants"]

# Shared memory that one program may use, bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
_SERIALISED = ("C7508", "C7510", "C7511")  # ptxas: wgmma made to run one after the other
_TYPE = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Variant:
    """A kernel with everything the compiler specialises on. Pointers are 16-byte aligned."""

    name: str
    kernel: object
    arch: int
    signature: dict[str, str]
    constants: dict[str, object]
    num_warps: int
    num_stages: int
    has_dot: bool  # a product of 16-bit values: has to reach the matrix units


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled variant takes, read from the artefact."""

    registers: int
    stack: int
    shared: int
    wgmma: int
    mma: int
    warnings: tuple[str, ...]


def screen(variant: Variant) -> Resources:
    """Compile a variant for its architecture, without a GPU.

    Raises:
        Whatever Triton raises for a kernel that does not compile.
    """
    names = list(variant.kernel.arg_names)
    signature = {
        name: "constexpr" if name in variant.constants else variant.signature[name]
        for name in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*")
        or (signature[name] == "i32" and (name.startswith("stride_") or name == "N"))
    }
    source = ASTSource(variant.kernel, signature, variant.constants, aligned)
    with _ptxas_log() as log:
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", variant.arch, 32),
            options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name)
        sass = _run(triton.knobs.nvidia.nvdisasm.path, "-c", cubin.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, f"cuobjdump gave no resource usage: {usage}"
    return Resources(
        registers=int(found[1]),
        stack=int(found[2]),
        shared=compiled.metadata.shared,
        wgmma=len(re.findall(r"\bHGMMA\b", sass)),
        mma=len(re.findall(r"\bHMMA\b", sass)),
        warnings=tuple(sorted({code for code in _SERIALISED if code in log.text})),
    )


def faults(variant: Variant, found: Resources) -> list[str]:
    """Why a compiled variant must not ship; empty if it may."""
    reasons = []
    if found.stack:
        reasons.append(f"{found.stack} bytes of stack")
    if found.warnings:
        reasons.append(f"serialised wgmma ({', '.join(found.warnings)})")
    if found.shared > SHARED_LIMIT[variant.arch]:
        reasons.append(f"{found.shared} bytes of shared memory")
    if variant.has_dot and variant.arch >= 90 and not found.wgmma:
        reasons.append("no wgmma")
    if variant.has_dot and variant.arch < 90 and not found.mma:
        reasons.append("no mma")
    return reasons


class _ptxas_log:
    """Collects what ptxas prints, which Triton sends to the standard output of the process.

    Has Triton compile even what its cache holds: of a kernel taken from there ptxas says nothing.
    """

    text = ""

    def __enter__(self):
        sys.stdout.flush()
        self._file = tempfile.TemporaryFile()
        self._stdout = os.dup(1)
        os.dup2(self._file.fileno(), 1)
        self._before = (
            triton.knobs.nvidia.dump_ptxas_log,
            triton.knobs.compilation.always_compile,
        )
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        return self

    def __exit__(self, *exc):
        sys.stdout.flush()
        (
            triton.knobs.nvidia.dump_ptxas_log,
            triton.knobs.compilation.always_compile,
        ) = self._before
        os.dup2(self._stdout, 1)
        os.close(self._stdout)
        self._file.seek(0)
        self.text = self._file.read().decode(errors="replace")
        self._file.close()


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _signature(kernel, pointers: dict[str, str], constants: dict[str, object]) -> dict[str, str]:
    """Types of all arguments: given for pointers, fp32 for scalars of the mathematics, else i32."""
    scalars = {"scale": "fp32", "scale_log2": "fp32", "eps": "fp32"}
    return {
        name: pointers.get(name) or scalars.get(name, "i32")
        for name in kernel.arg_names
        if name not in constants
    }


def _variant(kernel, label, arch, dtype, pointers, none, constants, tile, *, has_dot=False):
    constants = {**dict.fromkeys(none), **constants}
    value = f"*{_TYPE[dtype]}"
    pointers = {name: kind or value for name, kind in pointers.items()}
    return Variant(
        name=f"{kernel.__name__.strip('_')} sm_{arch} {_TYPE[dtype]} {label}",
        kernel=kernel,
        arch=arch,
        signature=_signature(kernel, pointers, constants),
        constants=constants,
        num_warps=tile.num_warps,
        num_stages=getattr(tile, "num_stages", 3),
        has_dot=has_dot and dtype.itemsize == 2,
    )


def _attention_variants(arch: int, dtype: torch.dtype) -> Iterator[Variant]:
    kernel = attention._attention_fwd_kernel
    maps = ("cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "tile_map_ptr")
    masks = ("key_mask_ptr", "bias_ptr")
    tensors = dict.fromkeys(("out_ptr", "q_ptr", "k_ptr", "v_ptr"))
    tensors["lse_ptr"] = "*fp32"
    with_bias = ({"key_mask_ptr": "*i1", "bias_ptr": None}, maps)
    forms = {  # what is there besides q, k and v, for which head sizes, what else is constant
        "packed": (dict.fromkeys(maps, "*i32"), masks, (16, 32, 64, 80, 96, 128), {}),
        "padded, mask": ({"key_mask_ptr": "*i1"}, (*maps, "bias_ptr"), (32, 64, 128), {}),
        # The compiler takes a stride of 1 as a constant.
        "padded, mask and bias": (*with_bias, (16, 32, 64, 128), {"stride_bias_k": 1}),
        "padded, mask and bias per query": (*with_bias, (16, 32, 64, 128), {}),
    }
    if dtype == torch.float32:
        packed = forms["packed"][:2]
        forms["packed, tf32"] = (*packed, (32, 64, 128), {"INPUT_PRECISION": "tf32"})
    for form, (extra, none, head_dims, also) in forms.items():
        for head_dim in head_dims:
            for tile in attention_tiles(arch, dtype, head_dim, "bias_ptr" in extra):
                constants = {
                    "HEAD_DIM": head_dim, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
                    "BLOCK_D": tile.block_d, "SINGLE": tile.single,
                    "RELOAD_Q": dtype == torch.float32, "INPUT_PRECISION": "ieee", **also,
                }  # fmt: skip
                step = "single" if tile.single else "online"
                label = f"D{head_dim} {tile.block_m}x{tile.block_n} {step} {form}"
                yield _variant(
                    kernel, label, arch, dtype, {**tensors, **extra}, none, constants, tile,
                    has_dot=True,
                )  # fmt: skip


def _row_variants(arch: int, dtype: torch.dtype) -> Iterator[Variant]:
    statistics = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
    for width in (32, 384, 768, 1024, 4096, 8192):
        tile = layernorm_tile(width)
        constants = {"N": width, "ROWS": tile.rows, "BLOCK_N": tile.block_n}
        kernel = layernorm._layernorm_fwd_kernel
        rows = ("y_ptr", "x_ptr", "residual_ptr", "input_bias_ptr", "weight_ptr", "bias_ptr")
        tensors = {**dict.fromkeys(rows), **statistics}
        for none in ((), ("residual_ptr", "input_bias_ptr")):
            label = f"N{width} {'plain' if none else 'residual and bias'}"
            yield _variant(kernel, label, arch, dtype, tensors, none, constants, tile)
        kernel = embedding._embedding_fwd_kernel
        rows = ("y_ptr", "word_ptr", "position_ptr", "token_type_ptr", "weight_ptr", "bias_ptr")
        ids = ("token_ids_ptr", "position_ids_ptr", "token_type_ids_ptr")
        tensors = {**dict.fromkeys(rows), **dict.fromkeys(ids, "*i64"), **statistics}
        yield _variant(kernel, f"N{width}", arch, dtype, tensors, (), constants, tile)
    for width in (16, 128, 512, 8192):
        tile = softmax_tile(width)
        kernel = softmax._softmax_fwd_kernel
        constants = {"ROWS": tile.rows, "BLOCK_N": tile.block_n}
        tensors = dict.fromkeys(("y_ptr", "x_ptr"))
        for kind, is_bool in ((None, False), ("*i1", True)):
            yield _variant(
                kernel, f"N{width} {'bool' if is_bool else 'additive'} mask", arch, dtype,
                {**tensors, "mask_ptr": kind}, (), {**constants, "IS_BOOL": is_bool}, tile,
            )  # fmt: skip


def _linear_variants(arch: int, dtype: torch.dtype) -> Iterator[Variant]:
    options = {"SHORT_ERF": dtype.itemsize == 2}
    products = [(activation, 4096, "ieee") for activation in ACTIVATIONS] + [("gelu", 64, "ieee")]
    if dtype == torch.float32:
        products.append(("gelu", 4096, "tf32"))
    for activation, m, precision in products:
        tile = gemm_tile(m=m, dtype=dtype, arch=arch)
        constants = {
                **options, "ACTIVATION": activation, "N": 3072, "K": 768,
                "INPUT_PRECISION": precision,
                "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
                "GROUP_M": tile.group_m,
            }  # fmt: skip
        label = f"{activation} {tile.block_m}x{tile.block_n}x{tile.block_k} {precision}"
        tensors = dict.fromkeys(("y_ptr", "x_ptr", "w_ptr", "bias_ptr"))
        kernel = linear._linear_fwd_kernel
        yield _variant(kernel, label, arch, dtype, tensors, (), constants, tile, has_dot=True)
    for activation in ACTIVATIONS:
        tile = bias_activation_tile(3072)
        constants = {
            **options, "ACTIVATION": activation, "N": 3072, "ROWS": tile.rows,
            "BLOCK_N": tile.block_n,
        }  # fmt: skip
        kernel = linear._bias_activation_fwd_kernel
        tensors = dict.fromkeys(("x_ptr", "bias_ptr"))
        yield _variant(kernel, activation, arch, dtype, tensors, (), constants, tile)


FAMILIES = {
    "attention": _attention_variants,
    "rows": _row_variants,
    "linear": _linear_variants,
}


def variants(family: str, arch: int) -> Iterator[Variant]:
    """Everything that a family of `FAMILIES` can launch on an architecture for BERT's sizes.

    bf16 stands for both 16-bit types: they differ in one bit of the instructions.
    """
    for dtype in (torch.bfloat16, torch.float32):
        yield from FAMILIES[family](arch, dtype)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compile every shipped tile and show its resources."
    )
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    bad = 0
    for arch in args.arch:
        for variant in (v for family in args.family for v in variants(family, arch)):
            found = screen(variant)
            reasons = faults(variant, found)
            bad += bool(reasons)
            row = {"name": variant.name, **asdict(found), "faults": reasons}
            text = json.dumps(row) if args.json else (
                f"{variant.name}: {found.registers} registers, {found.shared} B shared, "
                f"{found.wgmma} wgmma, {found.mma} mma {'; '.join(reasons)}"
            )  # fmt: skip
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
