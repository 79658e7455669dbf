"""Attention in fp32 on a CPU as one partition of oneDNN's graph, behind private parts of torch that
only this module knows, but for TorchScript's language (`onednn_layer`).

oneDNN computes the scores of a head, their softmax and the sum of values without leaving the cache
of a core (its graph API, pattern "scaled dot-product attention"). torch reaches that through
TorchScript alone: a graph in its intermediate language, whose executor hands what oneDNN knows to
it. On two EPYC cores with AVX-512 12 heads of 32 or 64 take 0.6 of the time of two products for 128
tokens, and 0.45 of SDPA's from 256 on; a frozen MiniLM takes 0.94 to 0.97 of its time for one text
of 81 to 150 tokens, 0.90 for 192, 0.85 to 0.88 for 256 and 0.77 for 512 (BERT base 0.97 for 128,
0.94 for 256, 0.86 for 512), for dense batches of 96, 128 and 256 tokens 0.99, 0.96 and 0.90.

A graph is compiled for one number of tokens, in 3 to 12 ms, and keeps 2 to 6 MB. So numbers are
rounded up as those of rows are (`fastbert.ops.onednn.bucket_of`), and what is added is masked,
which takes a sixth of the time. Sequences in a batch would have to be copied for it: that is a gain
from 145 tokens on (ragged batches of up to 200 tokens 0.95 to 0.97 of the time, of 200 to 256 0.88
and of up to 512 0.85; from 113 tokens on it would be 0.98 to 1.02).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .onednn import bucket_of

__all__ = ["available", "prepared"]

# Rounded numbers of tokens from which this is faster, and where rows have to be copied first. With
# AVX2 a MiniLM takes 0.97 to 1.03 of its time; on others it was not tried.
_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
_FROM, _COPIED_FROM = (92, 152) if _AVX512 else (math.inf, math.inf)
# oneDNN shares heads out among threads; with fewer for each this was not measured.
_HEADS_A_THREAD = 2
_lock = threading.Lock()

# Inputs are [S, H, D], a number and, where rows are masked, a row of scores; out comes
# [1, S, H, D]. oneDNN fuses what is between the transpositions and the last line.
_GRAPH = """
graph(%q : Tensor, %k : Tensor, %v : Tensor, %scale : Tensor{mask}):
  %none : NoneType = prim::Constant()
  %zero : int = prim::Constant[value=0]()
  %one : int = prim::Constant[value=1]()
  %two : int = prim::Constant[value=2]()
  %last : int = prim::Constant[value=-1]()
  %tokens_first : int[] = prim::Constant[value=[0, 2, 1, 3]]()
  %q1 : Tensor = aten::unsqueeze(%q, %zero)
  %k1 : Tensor = aten::unsqueeze(%k, %zero)
  %v1 : Tensor = aten::unsqueeze(%v, %zero)
  %heads_q : Tensor = aten::transpose(%q1, %one, %two)
  %heads_k : Tensor = aten::transpose(%k1, %one, %two)
  %heads_v : Tensor = aten::transpose(%v1, %one, %two)
  %turned_k : Tensor = aten::transpose(%heads_k, %two, %last)
  %products : Tensor = aten::matmul(%heads_q, %turned_k)
  %scores : Tensor = aten::mul(%products, %scale)
{masked}
  %weights : Tensor = aten::softmax({scores}, %last, %none)
  %context : Tensor = aten::matmul(%weights, %heads_v)
  %turned : Tensor = aten::permute(%context, %tokens_first)
  %out : Tensor = aten::contiguous(%turned, %zero)
  return (%out)
"""
_PLAIN = _GRAPH.format(mask="", masked="", scores="%scores")
_MASKED = _GRAPH.format(
    mask=", %mask : Tensor",
    masked="  %seen : Tensor = aten::add(%scores, %mask, %one)",
    scores="%seen",
)


def prepared(
    q: Tensor, length: int, scale: float
) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Attention in one sequence, for inference; None where it is not faster than what else there
    is, or oneDNN does not take tensors like these.

    Args:
        q: fp32 ``[S, H, D]``. S is the number of tokens, or this rounded up; rows behind the tokens
            may hold any finite values.
        length: tokens of the sequence.
        scale: factor for the scores.

    Returns:
        ``q, k, v -> [S, H, D]``, S rounded up, for tensors of q's shape and strides.
    """
    rows, shape, strides = bucket_of(length), q.shape, q.stride()
    copied = shape[0] < rows
    if rows < (_COPIED_FROM if copied else _FROM):
        return None
    threads = torch.get_num_threads()
    if shape[1] < _HEADS_A_THREAD * threads or not available():
        return None
    if copied:
        _, heads, size = shape
        shape, strides = (rows, heads, size), (heads * size, size, 1)
    function = _function(shape, strides, length < rows, threads)
    if function is None:
        return None
    others = (_number(scale), _mask(length, rows)) if length < rows else (_number(scale),)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if copied:
            q, k, v = (F.pad(t, (0, 0, 0, 0, 0, rows - length)) for t in (q, k, v))
        return function(q, k, v, *others)[0]

    return attend


@cache
def available() -> bool:
    """Whether this torch can do it, and gives the right numbers."""
    generator = torch.Generator("cpu").manual_seed(0)
    heads = _HEADS_A_THREAD * torch.get_num_threads()
    q, k, v = torch.randn(
        3, 16, heads, 8, generator=generator, dtype=torch.float32, device="cpu"
    ).unbind()
    function = _function(q.shape, q.stride(), True, torch.get_num_threads())
    if function is None:
        return False
    expected = F.scaled_dot_product_attention(*(t[:11].transpose(0, 1) for t in (q, k, v)))
    with torch.inference_mode():
        found = function(q, k, v, _number(8**-0.5), _mask(11, 16))[0, :11]
    return torch.allclose(found.transpose(0, 1), expected, atol=1e-5)


@lru_cache(maxsize=256)
def _function(
    shape: tuple[int, ...], strides: tuple[int, ...], masked: bool, threads: int
) -> Callable[..., Tensor] | None:
    """A graph that is compiled for inputs like these, None if oneDNN does not take it.

    The executor learns of sizes by running a graph, and then has it compiled where a switch of the
    whole process says so, which is on for no longer than that.
    """
    with torch.inference_mode(False), torch.no_grad():
        last = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        memory = torch.zeros(last, dtype=torch.float32, device="cpu")
        inputs = [memory.as_strided(shape, strides)] * 3 + [_number(1.0)]
        if masked:
            inputs.append(_mask(shape[0] - 1, shape[0]))
        with _lock:
            before = None
            try:
                before = torch._C._jit_set_llga_enabled(True)
                graph = torch._C.parse_ir(_MASKED if masked else _PLAIN)
                function = torch._C._create_function_from_graph("attend", graph)
                for _ in range(torch._C._jit_get_num_profiled_runs() + 1):
                    function(*inputs)
                compiled = str(torch._C._last_executed_optimized_graph())
            except (AttributeError, RuntimeError):
                return None
            finally:
                if before is not None:
                    torch._C._jit_set_llga_enabled(before)
    return function if "oneDNNFusionGroup" in compiled else None


@lru_cache(maxsize=64)
def _number(value: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([value], dtype=torch.float32, device="cpu")


@lru_cache(maxsize=1024)
def _mask(length: int, rows: int) -> Tensor:
    """``[1, 1, 1, rows]``: what is added to the scores of keys."""
    with torch.inference_mode(False):
        mask = torch.zeros(rows, dtype=torch.float32, device="cpu")
        mask[length:] = -math.inf
        return mask.view(1, 1, 1, rows)
