"""Reading SASS, the machine code of NVIDIA GPUs, as nvdisasm prints it.

Instructions are counted where they stand in the program; the inner loop is the innermost one with
matrix instructions, or the longest innermost one, or the whole program if it has no loop.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

__all__ = ["CLASSES", "Instruction", "Listing", "parse", "read"]

# Opcode prefix (before the first dot) -> class. First match wins; the rest are integer and moves.
_PATTERNS = (
    ("matrix", r"[HQI]?G?MMA|[HQID]MMA|UT[A-Z]*MMA"),
    ("special", r"MUFU"),
    ("float", r"F(ADD|MUL|FMA|MNMX|SEL|SETP|SET|CHK|SWZADD)\d*|H(ADD|MUL|FMA|MNMX|SETP)2|D[A-Z]+"),
    ("convert", r"[FI]2[FIP]P?|I2F|F2F|F2FP|FRND|I2FP|F2I"),
    ("global", r"LDG|STG|LDGSTS|UBLKCP|UTMALDG|UTMASTG|ATOMG|REDG?|LD|ST"),
    ("shared", r"LDS|LDSM|STS|STSM|LDSTS|UTCCP|LDTM|STTM"),
    ("local", r"LDL|STL"),
    ("exchange", r"SHFL|VOTE|VOTEU|MATCH|REDUX|R2UR|S2R|S2UR|CS2R"),
    ("barrier", r"BAR|WARPSYNC|WARPGROUP|SYNCS|DEPBAR|LDGDEPBAR|ARRIVES|MEMBAR|FENCE|ERRBAR|"
                r"B(SSY|SYNC|REAK|MOV)|NANOSLEEP|UCGABAR_ARV|UCGABAR_WAIT|YIELD"),
    ("branch", r"BRA|BRX|EXIT|RET|CALL|JMP|BPT"),
)  # fmt: skip
_COMPILED = tuple((name, re.compile(rf"(?:{pattern})$")) for name, pattern in _PATTERNS)
CLASSES = (*(name for name, _ in _PATTERNS), "integer")
_LABEL = re.compile(r"^\s*(\.L_[\w.$]+):")
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?P<predicate>@!?U?P[T\d]\s+)?"
    r"(?P<text>(?P<op>[A-Z][\w.]*).*?);"
)
_TARGET = re.compile(r"`\((\.L_[\w.$]+)\)")
# Without a condition, which may stand among the operands too.
_ENDS = re.compile(r"EXIT|RET\S*.*|BRX\S*.*|(BRA|JMP)\S*\s+`\(\.L_[\w.$]+\)")
_WIDTH = re.compile(r"\.(128|64|32|U16|S16|U8|S8)\b")


@dataclass(frozen=True)
class Listing:
    """What stands in a program.

    Attributes:
        total: all instructions, no-ops aside.
        mix: class of `CLASSES` -> count in the inner loop (or the whole program without loops).
        loop: instructions of the inner loop, 0 if there is none.
        opcodes: opcode with its modifiers -> count in the whole program.
        widths: ``"load 128"``, ``"async copy 128"``, ``"store 64"`` ... -> count, global memory,
            bits per thread.
    """

    total: int
    mix: dict[str, int]
    loop: int
    opcodes: dict[str, int]
    widths: dict[str, int]


@dataclass(frozen=True)
class Instruction:
    """One of a program.

    Attributes:
        text: without its predicate.
        target: the label that it may go to, if it is a branch.
        ends: whether the instruction behind it is not reached from here.
    """

    text: str
    target: str | None
    ends: bool


def parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions in the output of ``nvdisasm -c``, no-ops aside, and where labels stand.

    Raises:
        ValueError: no instruction in it.
    """
    program: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(program)
        elif (found := _INSTRUCTION.match(line)) and found["op"] != "NOP":
            branches = _class_of(found["op"]) == "branch"
            target = _TARGET.search(found["text"]) if branches else None
            ends = not found["predicate"] and _ENDS.fullmatch(found["text"].strip())
            program.append(
                Instruction(found["text"].strip(), target[1] if target else None, bool(ends))
            )
    if not program:
        raise ValueError("sass: expected the output of nvdisasm -c, found no instruction in it")
    return program, labels


def read(sass: str) -> Listing:
    """Count what stands in the output of ``nvdisasm -c``.

    Raises:
        ValueError: no instruction in it.
    """
    program, labels = parse(sass)
    lines = [instruction.text for instruction in program]
    opcodes = [text.split()[0].rstrip(";") for text in lines]
    kinds = [_class_of(op) for op in opcodes]
    loops = [
        (labels[instruction.target], i + 1)
        for i, instruction in enumerate(program)
        if labels.get(instruction.target, i + 1) < i
    ]
    innermost = [
        a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)
    ]
    start, end = max(
        innermost,
        key=lambda loop: (kinds[slice(*loop)].count("matrix"), loop[1] - loop[0]),
        default=(0, 0),
    )
    body = slice(start, end) if end else slice(0, len(lines))
    return Listing(
        total=len(lines),
        mix={name: n for name in CLASSES if (n := kinds[body].count(name))},
        loop=end - start,
        opcodes=dict(Counter(opcodes).most_common()),
        widths=dict(sorted(Counter(filter(None, map(_width_of, opcodes))).items())),
    )


def _class_of(opcode: str) -> str:
    base = opcode.partition(".")[0]
    return next((name for name, pattern in _COMPILED if pattern.match(base)), "integer")


def _width_of(opcode: str) -> str | None:
    base = opcode.partition(".")[0]
    kind = {"LDG": "load", "STG": "store", "LDGSTS": "async copy"}.get(base)
    if kind is None:
        return None
    width = _WIDTH.search(opcode)
    bits = width[1].lstrip("US") if width else "32"
    return f"{kind} {bits}"
