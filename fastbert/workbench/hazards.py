"""Registers that an instruction touches while a warp-group product may still be using them.

On sm_90 a product (HGMMA) runs beside the instructions behind it until a WARPGROUP.DEPBAR waits for
its group. Till then its accumulator belongs to it, and so do the registers of an operand that is
not in shared memory; some versions of ptxas let other instructions have them (triton issue 9433).
All paths through a program are followed, with the groups that are in flight on each. What this
cannot see is shared memory: it finds this fault, and proves nothing else.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .sass import Instruction, parse

__all__ = ["hazards"]

_PRODUCT = re.compile(r"HGMMA\.\d+x(?P<n>\d+)x\d+\S*\s+R(?P<acc>\d+),\s*(?:R(?P<a>\d+)|gdesc)")
_OPERAND = 4  # registers of a thread that hold 64 rows of one step's operand
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
_REGISTER = re.compile(r"\bR(\d+)\b")
_WRITES_NONE = re.compile(
    r"(ST|STG|STS|STL|STSM|LDGSTS|RED|REDG|BAR|BRA|BRX|EXIT|RET|WARPGROUP|WARPSYNC|FENCE|MEMBAR|"
    r"DEPBAR|LDGDEPBAR|SYNCS|BSSY|BSYNC|ERRBAR|R2UR|R2P|[A-Z]+SETP|PLOP3)(\.|$)"
)
_MOST = 8  # groups that are told apart


class _Product(NamedTuple):
    accumulator: frozenset[int]
    operand: frozenset[int]
    commits: bool


class _InFlight(NamedTuple):
    """Products by their places in the program: groups that were committed, and the open one."""

    groups: tuple[frozenset[int], ...] = ()
    open: frozenset[int] = frozenset()

    def after(self, place: int, instruction: Instruction, product: _Product | None) -> _InFlight:
        if product is not None:
            group = self.open | {place}
            if not product.commits:
                return _InFlight(self.groups, group)
            groups = (*self.groups, group)
            if len(groups) > _MOST:
                groups = (groups[0] | groups[1], *groups[2:])
            return _InFlight(groups)
        wait = _WAIT.match(instruction.text)
        if wait is None:
            return self
        kept = int(wait[1], 16)
        return _InFlight(self.groups[len(self.groups) - kept :] if kept else (), self.open)


def _product(instruction: Instruction) -> _Product | None:
    found = _PRODUCT.match(instruction.text)
    if found is None:
        return None
    first = int(found["acc"])
    operand = range(int(found["a"]), int(found["a"]) + _OPERAND) if found["a"] else ()
    return _Product(
        frozenset(range(first, first + int(found["n"]) // 2)),
        frozenset(operand),
        "gsb0" in instruction.text,
    )


def _width(opcode: str) -> int:
    """Registers of what an instruction loads, stores or makes."""
    base, *marks = opcode.split(".")
    if base == "LDSM":
        return next((int(mark) for mark in marks if mark in ("2", "4")), 1)
    if "WIDE" in marks or (base == "CS2R" and "32" not in marks):
        return 2
    return {"64": 2, "128": 4}.get(next((m for m in marks if m in ("64", "128")), ""), 1)


def _registers(instruction: Instruction) -> tuple[frozenset[int], frozenset[int]]:
    """Those that an instruction writes, and all that it touches."""
    opcode, _, rest = instruction.text.partition(" ")
    operands = [part.strip() for part in rest.split(",")]
    while len(operands) > 1 and re.fullmatch(r"U?P(\d|T)", operands[0]):
        operands.pop(0)
    named = frozenset(int(n) for n in _REGISTER.findall(rest))
    first = re.fullmatch(r"R(\d+)", operands[0])
    width = _width(opcode)
    if first is None or _WRITES_NONE.match(opcode):
        stored = re.fullmatch(r"R(\d+)", operands[-1])
        wide = range(int(stored[1]), int(stored[1]) + width) if stored else ()
        return frozenset(), named | frozenset(wide)
    written = frozenset(range(int(first[1]), int(first[1]) + width))
    return written, named | written


def hazards(listing: str) -> list[str]:
    """What touches a product's registers too early, in words; of ``nvdisasm -c``'s output."""
    program, labels = parse(listing)
    products = [_product(instruction) for instruction in program]
    if not any(products):
        return []
    touched = [_registers(instruction) for instruction in program]
    found: dict[tuple[int, int], str] = {}
    seen: list[set[_InFlight]] = [set() for _ in program]
    todo = [(0, _InFlight())]
    while todo:
        place, flying = todo.pop()
        while place < len(program) and flying not in seen[place]:
            seen[place].add(flying)
            instruction, product = program[place], products[place]
            if product is None:
                written, all_of_them = touched[place]
                for other in flying.open.union(*flying.groups):
                    theirs = products[other]
                    if written & theirs.operand or all_of_them & theirs.accumulator:
                        found[place, other] = (
                            f"{instruction.text} before the end of {program[other].text}"
                        )
            flying = flying.after(place, instruction, product)
            target = instruction.target
            if target is not None and target in labels:
                todo.append((labels[target], flying))
            if instruction.ends:
                break
            place += 1
    return list(found.values())
