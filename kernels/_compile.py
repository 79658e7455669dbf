"""Compiling kernels for GPUs that are not here, and what came out.

`compile_variant` compiles one variant ahead of time and keeps everything that can be read from it:
PTX, SASS, Triton's GPU dialect, and ptxas's own words. Registers, stack, spills and warnings are
those of ptxas, instructions those of nvdisasm, which runs when somebody reads them; nothing is
estimated. `faults` says why a variant must not ship. Must run where Triton does not interpret:
interpreted functions cannot be compiled.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ._cards import LIMITS
from ._variants import Variant

__all__ = ["Artefact", "compile_variant", "faults", "ptxas_version"]

_SERIALISED = ("C7508", "C7510", "C7511", "C7515")  # ptxas: wgmma made to run one after the other


@dataclass(frozen=True)
class Artefact:
    """A compiled variant: what one program takes, and the texts that say so.

    Attributes:
        registers: per thread.
        stack, spill_stores, spill_loads: bytes per thread.
        shared: bytes per program.
        ptxas: what ptxas printed.
        cubin: what it made.
    """

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    ptxas: str
    ptx: str
    ttgir: str
    cubin: bytes

    @cached_property
    def sass(self) -> str:
        """The instructions of the GPU, by nvdisasm."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            command = (triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    @property
    def matrix_units(self) -> set[str]:
        """Which of wgmma, mma and tcgen05 the PTX asks for."""
        asked = {"wgmma": "wgmma.mma_async", "mma": "mma.sync", "tcgen05": "tcgen05.mma"}
        return {name for name, word in asked.items() if re.search(rf"(?m)^\W*{word}\b", self.ptx)}

    @property
    def wgmma(self) -> int:
        """Warp-group matrix instructions, sm_90."""
        return len(re.findall(r"\b[HQI]GMMA\b", self.sass))

    @property
    def mma(self) -> int:
        """Warp matrix instructions."""
        return len(re.findall(r"\b[HQI]MMA\b", self.sass))

    @property
    def tcgen05(self) -> int:
        """Matrix instructions of sm_100, whose operands are in tensor memory."""
        return len(re.findall(r"\bUT[A-Z]*MMA\b", self.sass))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Lines in which ptxas warned."""
        lines = (line.strip() for line in self.ptxas.splitlines())
        return tuple(line for line in lines if "warning" in line.lower() or "C75" in line)

    @property
    def serialised(self) -> tuple[str, ...]:
        """Codes of the warnings that say that wgmma were made to run one after the other."""
        return tuple(code for code in _SERIALISED if code in self.ptxas)


def ptxas_version() -> str:
    """Of the assembler that Triton brings along: it decides on registers, and some are wrong."""
    return triton.knobs.nvidia.ptxas.version


def compile_variant(variant: Variant) -> Artefact:
    """Compile for the variant's architecture, without a GPU.

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
            options={
                "num_warps": variant.num_warps,
                "num_stages": variant.num_stages,
                "maxnreg": variant.max_registers,
            },
        )
    return Artefact(
        **_said(log.text),
        shared=compiled.metadata.shared,
        ptx=compiled.asm["ptx"],
        ttgir=compiled.asm["ttgir"],
        cubin=compiled.asm["cubin"],
    )


def _said(log: str) -> dict[str, int | str]:
    """What ptxas printed, and what that says."""
    used = re.search(r"Used (\d+) registers", log)
    memory = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    assert used and memory, f"ptxas said nothing of registers and spills: {log}"
    stack, stores, loads = map(int, memory.groups())
    return {
        "registers": int(used[1]),
        "stack": stack,
        "spill_stores": stores,
        "spill_loads": loads,
        "ptxas": log,
    }


def faults(variant: Variant, found: Artefact) -> list[str]:
    """Why a compiled variant must not ship; empty if it may."""
    reasons = []
    if found.stack:
        reasons.append(f"{found.stack} bytes of stack")
    if found.serialised:
        reasons.append(f"serialised wgmma ({', '.join(found.serialised)})")
    if found.shared > LIMITS[variant.arch].shared_per_program:
        reasons.append(f"{found.shared} bytes of shared memory")
    if variant.has_dot:
        units = ("mma",) if variant.arch < 90 else ("wgmma",)
        if variant.arch >= 100:
            units = ("tcgen05", "mma")  # sm_120 has the latter alone
        if not found.matrix_units.intersection(units):
            reasons.append(" and ".join(f"no {unit}" for unit in units))
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
