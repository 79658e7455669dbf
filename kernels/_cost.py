"""What an operation must do at least: floating-point operations and bytes, as functions of sizes.

The numbers behind every TFLOP/s and GB/s that the project prints. Bytes count each operand and
each result once (the least traffic of kernels/README.md), whatever an implementation really moves;
operations count products alone (2 per multiply-add), as papers do. ``lengths`` are those of the
sequences of a batch: padding is no work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "Cost",
    "attention_bwd_cost",
    "attention_cost",
    "embedding_cost",
    "encoder_cost",
    "layernorm_bwd_cost",
    "layernorm_cost",
    "linear_cost",
    "rows_cost",
]


@dataclass(frozen=True)
class Cost:
    """Least work: floating-point operations and bytes to and from memory."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, factor: float) -> Cost:
        """The cost of doing it ``factor`` times."""
        return Cost(self.flops * factor, self.bytes * factor)

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes if self.bytes else 0.0


def attention_cost(
    lengths: Sequence[int], num_heads: int, head_dim: int, itemsize: int, bias_bytes: float = 0.0
) -> Cost:
    """Forward over self-attending sequences: two products per head; q, k, v in, result out."""
    tokens, pairs = sum(lengths), sum(n * n for n in lengths)
    moved = 4 * tokens * num_heads * head_dim * itemsize + bias_bytes
    return Cost(4.0 * pairs * num_heads * head_dim, float(moved))


def attention_bwd_cost(
    lengths: Sequence[int],
    num_heads: int,
    head_dim: int,
    itemsize: int,
    *,
    bias_bytes: float = 0.0,
) -> Cost:
    """Backward: five products (scores again, and dV, dP, dQ, dK); seven tensors besides dO, a bias
    and its gradient."""
    tokens, pairs = sum(lengths), sum(n * n for n in lengths)
    rows = 8.0 * tokens * num_heads * head_dim * itemsize
    return Cost(10.0 * pairs * num_heads * head_dim, rows + bias_bytes)


def rows_cost(rows: int, width: int, itemsize: int, tensors: int) -> Cost:
    """So many tensors ``[rows, width]`` in or out, once each."""
    return Cost(0.0, float(tensors * rows * width * itemsize))


def layernorm_cost(
    rows: int, width: int, itemsize: int, *, residual: bool = False, keep_sum: bool = False
) -> Cost:
    """x and perhaps a residual in, y and perhaps the sum out; the rest is small."""
    return rows_cost(rows, width, itemsize, 2 + residual + keep_sum)


def layernorm_bwd_cost(rows: int, width: int, itemsize: int, *, residual: bool = False) -> Cost:
    """dy and the sum in, dx and perhaps another gradient of the residual out."""
    return rows_cost(rows, width, itemsize, 3 + residual)


def embedding_cost(tokens: int, width: int, itemsize: int) -> Cost:
    """Three rows in and one out per token, and three 8-byte ids."""
    return Cost(0.0, tokens * (4.0 * width * itemsize + 24))


def linear_cost(m: int, n: int, k: int, itemsize: int) -> Cost:
    """``[M, K] x [K, N]``."""
    return Cost(2.0 * m * n * k, float((m * k + n * k + m * n) * itemsize))


def encoder_cost(
    lengths: Sequence[int],
    *,
    num_layers: int,
    hidden_size: int,
    intermediate_size: int,
    itemsize: int,
) -> Cost:
    """A forward pass of the layers: four projections, attention, feed-forward, two LayerNorms."""
    tokens, e, f = sum(lengths), hidden_size, intermediate_size
    layer = linear_cost(tokens, 3 * e, e, itemsize) + linear_cost(tokens, e, e, itemsize)
    layer += linear_cost(tokens, f, e, itemsize) + linear_cost(tokens, e, f, itemsize)
    # The head size does not matter for the whole: H * D = E.
    layer += attention_cost(lengths, 1, e, itemsize)
    layer += layernorm_cost(tokens, e, itemsize, residual=True).times(2)
    return layer.times(num_layers)
