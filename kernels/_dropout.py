"""Dropout masks as functions of (seed, position), the same for every tile, forward and backward.

No mask is stored. Kernels and `scores_kept`, `values_kept` - the same in torch, for tests - compute
it from a 64-bit seed, which is in a tensor on the device so that a captured CUDA graph can be
replayed with new ones. The seed and what is masked (a head of a sequence, a row) make two 32-bit
keys, by a finaliser of the murmur kind, whose constants are Wellons's lowbias32
(github.com/skeeto/hash-prospector), which also mixes them with a place in a row. The place of a
score, of which there are many more for each byte of memory, goes through two products of 64 bits,
each folded to 32, with the multipliers of Philox (Salmon et al., SC 2011): three instructions a
round, which no statistic of `tests/test_dropout.py` tells from chance. One 32-bit word serves
several values: the 2x2 block of rows r, r + 8 and columns c, c + 8, which one thread owns in the
layout of the matrix units whichever way a tile is turned, or two neighbours of a row.

Fields of 8 or 16 bits make the probability a multiple of 1/256 or 1/65536. `dropout_levels` takes 8
bits for scores where that changes p by at most 2 % of p (0.1 becomes 0.1016), and what stays is
scaled by the probability that is really used, so that the mean is exact.
"""

import torch
import triton
import triton.language as tl

__all__ = ["dropout_levels", "scores_kept", "values_kept"]

_GOLDEN = tl.constexpr(0x9E3779B9)  # 2**32 / golden ratio, the usual odd increment


@triton.jit
def _mix(x, key):
    """A bijection of 32-bit words that depends on a key."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15) ^ key
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropout_keys(seed_ptr, major, minor):
    """Two keys for a seed and two numbers, which may be vectors."""
    seed = tl.load(seed_ptr)
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    first = _mix(_mix(major.to(tl.uint32) ^ low, high) ^ minor.to(tl.uint32), low)
    return first, _mix(first + _GOLDEN, high)


@triton.jit
def _folded(x, factor):
    """Both halves of a product of 32-bit words, one on the other by exclusive or."""
    product = x.to(tl.uint64) * factor
    return (product >> 32).to(tl.uint32) ^ product.to(tl.uint32)


@triton.jit
def _word(position, key_0, key_1):
    """A random word for a position, by two keys."""
    return _folded(_folded(position.to(tl.uint32) + key_0, 0xD2511F53) ^ key_1, 0xCD9E8D57)


@triton.jit
def keep_scores(key_0, key_1, rows, first_row, columns, first_column, threshold,
                BITS: tl.constexpr):  # fmt: skip
    """Which scores of a tile stay.

    ``rows`` and ``columns`` come from ``tl.arange`` and are expanded, either way round: only then
    does the compiler see that four values share a word. The tile's first ones are multiples of 16.
    """
    column = (columns >> 4) * 8 + (columns & 7)
    if BITS == 8:
        row = (rows >> 4) * 8 + (rows & 7)
        first = (first_row // 2 << 16) + first_column // 2
        field = ((rows >> 3) & 1) * 2 + ((columns >> 3) & 1)
    else:
        row = rows
        first = (first_row << 16) + first_column // 2
        field = ((columns >> 3) & 1) + rows * 0
    word = _word((row << 16) + column, first.to(tl.uint32) + key_0, key_1)
    # The field is where a word has its highest bits, so that what is below it decides nothing; one
    # less than the threshold, which may be all values of a field.
    high = word << (32 - BITS - BITS * field).to(tl.uint32)
    return high > (threshold.to(tl.uint32) << (32 - BITS)) - 1


@triton.jit
def keep_values(seed_ptr, rows, columns, threshold):
    """Which values of rows ``[ROWS, BLOCK_N]`` stay; fields of 16 bits."""
    key_0, key_1 = dropout_keys(seed_ptr, rows, rows >> 32)
    pair = (columns >> 1).to(tl.uint32)[None, :]
    word = _mix(pair ^ key_0[:, None], key_1[:, None])
    shift = ((columns & 1) * 16).to(tl.uint32)[None, :]
    return ((word >> shift) & 0xFFFF) >= threshold


def dropout_levels(p: float, *, coarse: bool) -> tuple[int, int, float]:
    """How a probability is compared.

    Args:
        p: of dropping a value, 0 to 1.
        coarse: fields of 8 bits will do where they hit p within 2 % of it.

    Returns:
        Bits of a field, 0 for no dropout; the fields below this threshold are dropped; the factor
        for what stays, 0 if nothing does.
    """
    if p == 0.0:
        return 0, 0, 1.0
    bits = 8 if coarse and abs(round(p * 256) / 256 - p) <= 0.02 * p else 16
    levels = 1 << bits
    threshold = max(1, round(p * levels))
    return bits, threshold, 0.0 if threshold == levels else levels / (levels - threshold)


def _mix_ref(x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ (x >> 15) ^ key
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def _word_ref(position: torch.Tensor, key_0: torch.Tensor, key_1: torch.Tensor) -> torch.Tensor:
    def folded(x: torch.Tensor, factor: int) -> torch.Tensor:
        product = x * factor  # its low 64 bits, whatever the sign
        return (product >> 32 ^ product) & 0xFFFFFFFF

    return folded(folded(position + key_0 & 0xFFFFFFFF, 0xD2511F53) ^ key_1, 0xCD9E8D57)


def _keys_ref(seed: int, major: torch.Tensor, minor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    low, high = (torch.tensor(s & 0xFFFFFFFF) for s in (seed, seed >> 32))
    first = _mix_ref(_mix_ref((major & 0xFFFFFFFF) ^ low, high) ^ (minor & 0xFFFFFFFF), low)
    return first, _mix_ref(first + _GOLDEN.value & 0xFFFFFFFF, high)


def scores_kept(
    seed: int, num_sequences: int, num_heads: int, len_q: int, len_k: int, p: float
) -> torch.Tensor:
    """The factors that attention applies to its probabilities: 0, or the scale of what stays.

    Returns:
        fp64 ``[B, H, Sq, Sk]`` on the CPU.
    """
    bits, threshold, scale = dropout_levels(p, coarse=True)
    if bits == 0:
        return torch.ones(num_sequences, num_heads, len_q, len_k, dtype=torch.float64)
    sequence = torch.arange(num_sequences)[:, None, None, None]
    head = torch.arange(num_heads)[:, None, None]
    key_0, key_1 = _keys_ref(seed, sequence, head)
    row, column = torch.arange(len_q)[:, None], torch.arange(len_k)
    shift = (column >> 3 & 1) * bits
    if bits == 8:
        shift = shift + (row >> 3 & 1) * 16
        row = (row >> 4) * 8 + (row & 7)
    column = (column >> 4) * 8 + (column & 7)
    word = _word_ref(row << 16 | column, key_0, key_1)
    return ((word >> shift & (1 << bits) - 1) >= threshold) * torch.tensor(scale).double()


def values_kept(seed: int, num_rows: int, width: int, p: float) -> torch.Tensor:
    """The factors that dropout applies to rows, fp64 ``[M, N]`` on the CPU."""
    _, threshold, scale = dropout_levels(p, coarse=False)
    if p == 0.0:
        return torch.ones(num_rows, width, dtype=torch.float64)
    rows, columns = torch.arange(num_rows), torch.arange(width)
    key_0, key_1 = _keys_ref(seed, rows, rows >> 32)
    word = _mix_ref((columns >> 1) ^ key_0[:, None], key_1[:, None])
    fields = word >> (columns & 1) * 16 & 0xFFFF
    return (fields >= threshold) * torch.tensor(scale).double()
