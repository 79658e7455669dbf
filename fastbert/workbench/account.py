"""The static account of kernels/README.md: what each kernel takes of a GPU, by its compiled code.

python -m fastbert.workbench.account            # compile it for three cards, write the table

A prediction, for a measurement to confirm or refute: the least time of a typical problem on each
unit of a card, at the rates of its data sheet. A comment behind the table names what was compiled
as ``tests/compiled.txt`` does, so that a test can tell when the table is stale.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from ..kernels._cards import CARDS, Card
from ..kernels._variants import Variant, variants
from .inspection import Inspection, inspect_variant

__all__ = ["accounted", "recorded", "rendered"]

README = Path(__file__).resolve().parents[2] / "kernels/README.md"
_BLOCK = re.compile(r"(<!-- account:begin -->\n).*?(<!-- account:end -->)", re.S)
_FIRST, *_OTHERS = (
    next(card for card in CARDS if card.name == name)
    for name in ("H100 SXM", "A100 SXM 80GB", "L40S")
)
# For each kernel of the list the variants that stand for it: their names without architecture and
# dtype, which is bf16; of several tiles the last, which has most of the work.
_SHOWN = {
    "attention": (r"attention_fwd_kernel D64 \S+ online packed",
                  r"attention_fwd_kernel D64 \S+ single packed",
                  r"attention_fwd_kernel D32 \S+ single packed",
                  r"attention_fwd_kernel D64 \S+ online padded, mask",
                  r"attention_fwd_kernel D64 \S+ online packed, dropout 8 bit"),
    "attention_bwd": (r"attention_bwd_kernel_whole D64 \S+ packed",
                      r"attention_bwd_kernel_dq D64 \S+ packed",
                      r"attention_bwd_kernel_dkdv D64 \S+ packed",
                      r"attention_bwd_kernel_whole D64 \S+ packed, dropout 8 bit",
                      r"attention_bwd_kernel_dq D64 \S+ packed, dropout 8 bit",
                      r"attention_bwd_kernel_dkdv D64 \S+ packed, dropout 8 bit"),
    "softmax": ("softmax_fwd_kernel N512 additive mask",),
    "layernorm": ("layernorm_fwd_kernel N768 residual and bias",
                  "layernorm_fwd_kernel N768 residual, bias, dropout, sum"),
    "layernorm_bwd": ("layernorm_bwd_kernel N768 dropout", "column_sums_kernel N768",
                      "layernorm_again_kernel N768"),
    "embedding": ("embedding_fwd_kernel N768",),
    "linear": (r"linear_fwd_kernel gelu 1?\d+x128x\d+ ieee",),
    "bias_activation": ("bias_activation_fwd_kernel gelu",),
    "activation_bwd": ("activation_bwd_kernel gelu",),
    "cross_entropy": ("cross_entropy_kernel V30522 with gradient",),
}  # fmt: skip
_COLUMNS = (
    "kernel, on sm_90", "registers, programs", "instructions", "memory", "products", "issue",
    "exp", "H100", "A100", "L40S",
)  # fmt: skip
_UNITS = {"instructions": "issue", "exponentials": "exp"}


def accounted(arch: int) -> list[Variant]:
    """The variants of the table for an architecture."""
    chosen = []
    for kernel, patterns in _SHOWN.items():
        found = list(variants(kernel, arch, dtypes=(torch.bfloat16,)))
        for pattern in patterns:
            named = [v for v in found if re.fullmatch(pattern, _plain(v))]
            chosen.append(named[-1])
    return chosen


def _plain(variant: Variant) -> str:
    return variant.name.replace(f" sm_{variant.arch} bf16", "")


def _expected(inspected: Inspection, card: Card) -> str:
    """What bounds it there, and the share of the roofline if no unit works beside another, and if
    all do."""
    seconds = inspected.seconds(card)
    bound = max(seconds, key=seconds.get)
    least = max(seconds["memory"], seconds["products"])
    low, high = least / sum(seconds.values()), least / seconds[bound]
    return f"{_UNITS.get(bound, bound)}, {100 * low:.0f} to {100 * high:.0f} %"


def _rows() -> Iterator[tuple[str, ...]]:
    cards = (_FIRST, *_OTHERS)
    for same in zip(*(accounted(card.arch) for card in cards), strict=True):
        first, *others = map(inspect_variant, same)
        used, microseconds = first.occupancy, first.seconds(_FIRST)
        yield (
            f"`{_plain(first.variant)}`, {first.variant.example}",
            f"{first.artefact.registers}, {used.programs} of {first.variant.num_warps} warps",
            f"{sum(first.per_element.values()):.3g} a {first.variant.element}",
            *(f"{1e6 * s:.3g}" for s in microseconds.values()),
            *(_expected(one, card) for one, card in zip((first, *others), cards, strict=True)),
        )


def rendered(text: str, rows: Iterator[tuple[str, ...]], names: Iterator[str]) -> str:
    """The README's text with these rows as its table, and what was compiled for them."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "<!-- compiled:", *names, "-->"]
    body = "\n".join(lines)
    text, count = _BLOCK.subn(lambda m: f"{m[1]}{body}\n{m[2]}", text)
    if count != 1:
        raise ValueError("kernels/README.md: expected one place for the account")
    return text


def recorded(record: str) -> list[str]:
    """The lines of ``tests/compiled.txt`` that the table is made of, up to their digests."""
    names = {v.name for card in (_FIRST, *_OTHERS) for v in accounted(card.arch)}
    lines = (line.partition(" registers=")[0] for line in record.splitlines()[1:])
    return [line for line in lines if line.rpartition(" ")[0] in names]


def main() -> None:
    """Write the table."""
    record = README.parents[1].joinpath("tests/compiled.txt").read_text("utf-8")
    text = rendered(README.read_text("utf-8"), _rows(), recorded(record))
    README.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
