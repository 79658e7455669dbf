"""The record of everything that can be launched, compiled: ``make compiled`` writes it anew.

``compiled.txt`` has a line for each variant, architecture and dtype: a digest of all that the
compiler was given (the device code with what it calls, signature, constants, warps, stages, a limit
of registers), and what came of it. Where both are as they were, and so is the compiler, the result
is as it was: the test compiles what has another digest or none, and a sample of the rest, which has
to come out as it stands there.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import triton
from fastbert.kernels import _compile
from fastbert.kernels._variants import KERNELS, Variant, variants
from triton.language.core import constexpr

from fastbert.workbench.inspection import inspect_variant, room_for_two

RECORD = Path(__file__).with_name("compiled.txt")
ARCHS = (80, 89, 90)
DTYPES = (torch.bfloat16, torch.float32)
SAMPLE = 400  # one of so many is compiled all the same
_FIELDS = ("registers", "stack", "spill_stores", "shared", "programs_per_sm")


class Line(NamedTuple):
    """One line of the record."""

    digest: str
    found: dict[str, int]

    def __str__(self) -> str:
        return f"{self.digest} {' '.join(f'{name}={value}' for name, value in self.found.items())}"


def compiler() -> str:
    """What results, and the digests of code, depend on beside the kernels."""
    python = ".".join(map(str, sys.version_info[:2]))
    return f"triton {triton.__version__}, ptxas {_compile.ptxas_version()}, python {python}"


@cache
def device_code(kernel) -> str:
    """A kernel without comments and docstrings, and all that it calls or reads."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn)))
    parts, names = [], {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    parts.append(ast.unparse(tree))
    known = kernel.fn.__globals__
    values = {name: known[name] for name in names & known.keys()}
    for node in ast.walk(tree):  # of a module
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = values.get(node.value.id)
            if isinstance(owner, ModuleType) and hasattr(owner, node.attr):
                values[f"{node.value.id}.{node.attr}"] = getattr(owner, node.attr)
    for name, value in sorted(values.items(), key=itemgetter(0)):
        if isinstance(value, triton.JITFunction) and value is not kernel:
            parts.append(device_code(value))
        elif isinstance(value, constexpr | int | float | str):
            parts.append(f"{name}={value!r}")
    return "\n".join(parts)


def digest_of(variant: Variant) -> str:
    """Of all that the compiler is given."""
    given = (
        device_code(variant.kernel), sorted(variant.signature.items()),
        sorted(variant.constants.items()), variant.num_warps, variant.num_stages, variant.arch,
    )  # fmt: skip
    if variant.max_registers is not None:
        given += (variant.max_registers,)
    return hashlib.sha256(repr(given).encode()).hexdigest()[:12]


@cache
def everything(kernels: tuple[str, ...] = tuple(KERNELS)) -> dict[str, Variant]:
    """All variants by name."""
    found: dict[str, Variant] = {}
    for kernel in kernels:
        for arch in ARCHS:
            for variant in variants(kernel, arch, dtypes=DTYPES):
                same = found.setdefault(variant.name, variant)
                assert digest_of(same) == digest_of(variant), f"two are called {variant.name}"
    return found


def compiled(name: str, look_for_room: bool) -> tuple[Line, list[str]]:
    """What comes of a variant, and what is wrong with it.

    Args:
        look_for_room: whether it is wrong to be alone where two programs fit, which hangs on a few
            registers and so on the compiler.
    """
    variant = everything()[name]
    found = inspect_variant(variant)
    row = found.resources()
    wrong = found.faults + (room_for_two(found) if look_for_room else [])
    return Line(digest_of(variant), {field: row[field] for field in _FIELDS}), wrong


def read(path: Path = RECORD) -> tuple[str, dict[str, Line]]:
    """The compiler, and the lines by name."""
    first, *lines = path.read_text("utf-8").splitlines()
    record = {}
    for line in lines:
        name, digest, *fields = line.rsplit(" ", 1 + len(_FIELDS))
        pairs = (field.partition("=")[::2] for field in fields)
        record[name] = Line(digest, {field: int(value) for field, value in pairs})
    return first, record


def write(lines: dict[str, Line], path: Path = RECORD) -> None:
    """All of them, in the order of their names."""
    text = "".join(f"{name} {lines[name]}\n" for name in sorted(lines))
    path.write_text(f"{compiler()}\n{text}", "utf-8")


def sample(names: list[str]) -> Iterator[str]:
    """The first of each kernel, and one of `SAMPLE` of all."""
    begun = set()
    for i, name in enumerate(sorted(names)):
        kernel = name.split()[0]
        if kernel not in begun or i % SAMPLE == 0:
            yield name
        begun.add(kernel)


def compile_all(names: list[str], look_for_room: bool) -> dict[str, tuple[Line, list[str]]]:
    """`compiled` of each, in as many processes as there are cores."""
    each = partial(compiled, look_for_room=look_for_room)
    with ProcessPoolExecutor(int(os.environ.get("WORKERS", os.cpu_count() or 1))) as pool:
        return dict(zip(names, pool.map(each, names, chunksize=4), strict=True))


def check(path: Path, kernels: tuple[str, ...]) -> dict[str, list]:
    """Compile what has to be of some kernels.

    Returns:
        ``compiled``: what was; ``faults``: what must not ship; ``changed``: what the record does
        not have, or has otherwise; ``gone``: what only the record has.
    """
    known, record = read(path)
    all_of_them = everything(kernels)
    digests = {name: digest_of(variant) for name, variant in all_of_them.items()}
    same_compiler = known == compiler()
    changed = [n for n, d in digests.items() if n not in record or record[n].digest != d]
    names = sorted({*changed, *sample(list(all_of_them))}) if same_compiler else sorted(digests)
    found = compile_all(names, same_compiler)
    faults = [f"{name}: {why}" for name, (_, faults) in found.items() for why in faults]
    if same_compiler:
        changed += [n for n, (line, _) in found.items() if record.get(n) not in (None, line)]
    return {
        "compiled": names,
        "faults": faults,
        "changed": sorted(set(changed)),
        "gone": sorted(record.keys() - all_of_them.keys()),
    }


def main(path: str | None = None, *kernels: str) -> int:
    """Write the record, or with a path say what differs from the one there, as JSON."""
    if path is not None:
        sys.stdout.write(json.dumps(check(Path(path), kernels or tuple(KERNELS))))
        return 0
    known, record = read() if RECORD.exists() else ("", {})
    digests = {name: digest_of(variant) for name, variant in everything().items()}
    new = [n for n, d in digests.items()
           if known != compiler() or n not in record or record[n].digest != d]  # fmt: skip
    found = compile_all(new, True)
    for name, (_, faults) in found.items():
        for why in faults:
            sys.stdout.write(f"{name}: {why}\n")
    lines = {n: found[n][0] if n in found else record[n] for n in digests}
    write(lines)
    sys.stdout.write(f"{len(found)} of {len(lines)} variants were compiled\n")
    return 1 if any(faults for _, faults in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
