"""Bytes moved and floating-point operations of each op, the least any implementation needs.

Profiles and benchmarks read the same numbers: time over these is the fraction of the machine's
limit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Cost", "attention_fwd", "embedding_fwd", "layernorm_fwd", "linear_fwd", "softmax_fwd"]


@dataclass(frozen=True)
class Cost:
    """Device memory traffic and arithmetic of one call."""

    bytes: int
    flops: int


def attention_fwd(
    lengths_q: Sequence[int], lengths_k: Sequence[int], num_heads: int, head_dim: int, itemsize: int
) -> Cost:
    """q, k, v read once and out written once, fp32 statistics written; two products per score."""
    rows_q, rows_k = sum(lengths_q), sum(lengths_k)
    scores = sum(a * b for a, b in zip(lengths_q, lengths_k, strict=True))
    width = num_heads * head_dim
    return Cost(
        bytes=(2 * rows_q + 2 * rows_k) * width * itemsize + 4 * rows_q * num_heads,
        flops=4 * scores * width,
    )


def layernorm_fwd(rows: int, width: int, itemsize: int, *, residual: bool) -> Cost:
    """x, the residual and y once each, two fp32 statistics a row."""
    return Cost(
        bytes=rows * width * itemsize * (3 if residual else 2) + 8 * rows,
        flops=rows * width * (9 if residual else 8),
    )


def softmax_fwd(rows: int, width: int, itemsize: int) -> Cost:
    """x read, probabilities written."""
    return Cost(bytes=2 * rows * width * itemsize, flops=5 * rows * width)


def embedding_fwd(rows: int, width: int, itemsize: int, *, num_tables: int = 3) -> Cost:
    """A row of each table read, one written; the ids are int64."""
    return Cost(
        bytes=rows * (width * itemsize * (num_tables + 1) + 8 * num_tables + 8),
        flops=rows * width * (8 + num_tables),
    )


def linear_fwd(m: int, n: int, k: int, itemsize: int) -> Cost:
    """x, the weight and the bias read, out written."""
    return Cost(bytes=(m * k + n * k + n + m * n) * itemsize, flops=2 * m * n * k)
