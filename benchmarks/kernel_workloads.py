"""Single operations, forward and backward, each against every implementation that runs here.

An operation is an `_Op`: how its inputs are made, its reference, what others call, its least work.
Every provider sees the same values, in the layout it wants; outputs are brought to one layout
before they are compared with the reference in fp64, outside of what is timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from fastbert.kernels import _cost
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbert import ops
from fastbert.ops.reference import attention_ref, embed_ref, layer_norm_ref, linear_ref, softmax_ref
from fastbert.packing import PackedBatch

from .results import Check
from .shapes import draw_lengths
from .timing import cold_sets
from .workload import OURS, Prepared, Unavailable, Workload, checked_against

__all__ = ["EAGER", "FLASH_ATTN", "OPS", "SDPA", "VARLEN", "kernel"]

EAGER, COMPILED, LIGER = "torch eager", "torch.compile", "Liger"
VARLEN, FLASH_ATTN = "torch varlen_attn", "flash-attn"
SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
Inputs = dict[str, Any]
Function = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class _Op:
    """An operation and everybody who offers it.

    Attributes:
        make: (params, dtype, device, seed) -> inputs; those named in ``leaves`` have gradients.
        reference: the specification; also gives the check its oracle, from fp64 inputs.
        others: provider -> builder of its function, given the device.
        cost: (params, itemsize) -> least work of forward, and of backward.
        rows: (inputs, output) -> what is compared, where a provider's layout differs.
        oracle: the reference in another order, where fp64 would take too much memory at once.
    """

    make: Callable[[dict, torch.dtype, str, int], Inputs]
    reference: Function
    ours: Function
    others: dict[str, Callable[[str], Function]]
    leaves: tuple[str, ...]
    cost: Callable[[dict, int], tuple[_cost.Cost, _cost.Cost]]
    rows: Callable[[Inputs, Tensor], Tensor] = lambda x, out: out
    oracle: Function | None = None


def _compiled(function: Function) -> Callable[[str], Function]:
    def build(device: str) -> Function:
        torch._dynamo.reset()
        mode = "max-autotune-no-cudagraphs" if device == "cuda" else None
        return torch.compile(function, mode=mode, dynamic=False)

    return build


def _needs(package: str, device: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package.replace('_', '-')} is not installed")
    if device != "cuda":
        raise Unavailable(f"{package.replace('_', '-')} needs a GPU")


def _normals(device: str, seed: int) -> Callable[..., Tensor]:
    """``sizes -> `` standard normal values in fp32, drawn where they are needed: on a CPU the
    largest workloads would take seconds each."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *sizes: torch.randn(*sizes, generator=generator, device=device)


def _eager(function: Function) -> Callable[[str], Function]:
    return lambda device: function


# ---- attention ----


def _make_attention(p: dict, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    b, s, h, d = p["B"], p["S"], p["H"], p["D"]
    lengths = draw_lengths(p.get("lengths", "fixed"), b, s)
    draw = _normals(device, seed)
    qkv = draw(b, s, 3, h, d).to(dtype)
    keep = (torch.arange(s) < torch.tensor(lengths)[:, None]).to(device)
    inputs = {"keep": None if bool(keep.all()) else keep, "lengths": lengths, "qkv": qkv[keep]}
    inputs |= {name: qkv[:, :, i].transpose(1, 2) for i, name in enumerate("qkv")}
    inputs["batch"] = PackedBatch.from_lengths(lengths, device=device)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    inputs["cu_seqlens"], inputs["longest"] = cu, max(lengths)
    if p.get("bias"):
        inputs["bias"] = draw(1, h, s, s).to(dtype)
    return inputs


def _packed(x: Inputs) -> tuple[Tensor, ...]:
    return x["qkv"].unbind(1)


def _padded(x: Inputs) -> tuple[Tensor, ...]:
    return x["q"], x["k"], x["v"]


def _attention_ref(x: Inputs) -> Tensor:
    return attention_ref(*_padded(x), x["keep"], x.get("bias"))


def _attention_oracle(x: Inputs) -> Tensor:
    """One sequence after the other: the scores of a long batch in fp64 fill a GPU."""
    parts = [
        attention_ref(
            *(t[i : i + 1] for t in _padded(x)),
            None if x["keep"] is None else x["keep"][i : i + 1],
            x.get("bias"),
        )
        for i in range(len(x["lengths"]))
    ]
    return torch.cat(parts)


def _attention_ours(x: Inputs) -> Tensor:
    return ops.attention_qkv(x["qkv"], x["batch"])


def _attention_bias_ours(x: Inputs) -> Tensor:
    return ops.attention(*_padded(x), key_mask=x["keep"], bias=x["bias"])


def _attention_by_place_ours(x: Inputs) -> Tensor:
    bias = x["bias"][0, :, : x["longest"], : x["longest"]]
    return ops.attention_qkv(x["qkv"], x["batch"], bias=bias)


def _sdpa(backend: SDPBackend) -> Callable[[str], Function]:
    def run(x: Inputs) -> Tensor:
        mask = x.get("bias")
        if x["keep"] is not None:
            keep = x["keep"][:, None, None, :]
            mask = keep if mask is None else mask.masked_fill(~keep, -torch.inf)
        with sdpa_kernel(backend):
            try:
                return F.scaled_dot_product_attention(*_padded(x), attn_mask=mask)
            except RuntimeError as error:
                if "No available kernel" in str(error) or "No viable backend" in str(error):
                    raise Unavailable("this backend of sdpa does not take this case") from None
                raise

    return _eager(run)


def _varlen_attn(device: str) -> Function:
    if device != "cuda":
        raise Unavailable("varlen_attn needs a GPU")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise Unavailable("this torch has no varlen_attn") from None

    def run(x: Inputs) -> Tensor:
        cu, longest = x["cu_seqlens"], x["longest"]
        return varlen_attn(*_packed(x), cu, cu, longest, longest)

    return run


def _flash_attn(device: str) -> Function:
    _needs("flash_attn", device)
    from flash_attn import flash_attn_varlen_func

    def run(x: Inputs) -> Tensor:
        cu, longest = x["cu_seqlens"], x["longest"]
        return flash_attn_varlen_func(*_packed(x), cu, cu, longest, longest)

    return run


def _attention_rows(x: Inputs, out: Tensor) -> Tensor:
    """Padded outputs ``[B, H, S, D]`` as packed rows ``[T, H, D]``."""
    if out.dim() == 3:
        return out
    out = out.transpose(1, 2)
    return out.flatten(0, 1) if x["keep"] is None else out[x["keep"]]


def _attention_cost(p: dict, itemsize: int):
    lengths = draw_lengths(p.get("lengths", "fixed"), p["B"], p["S"])
    bias = p["H"] * p["S"] ** 2 * itemsize if p.get("bias") else 0
    sizes = (p["H"], p["D"], itemsize)
    forward = _cost.attention_cost(lengths, *sizes, bias_bytes=bias)
    return forward, _cost.attention_bwd_cost(lengths, *sizes)


_SDPA = {name: _sdpa(backend) for name, backend in SDPA.items()}
_ATTENTION = _Op(
    make=_make_attention,
    reference=_attention_ref,
    ours=_attention_ours,
    others={
        EAGER: _eager(_attention_ref),
        COMPILED: _compiled(_attention_ref),
        **_SDPA,
        VARLEN: _varlen_attn,
        FLASH_ATTN: _flash_attn,
    },
    leaves=("qkv",),
    cost=_attention_cost,
    rows=_attention_rows,
    oracle=_attention_oracle,
)
_ATTENTION_BIAS = _Op(
    make=_make_attention,
    reference=_attention_ref,
    ours=_attention_bias_ours,
    others={EAGER: _eager(_attention_ref), COMPILED: _compiled(_attention_ref), **_SDPA},
    leaves=("q", "k", "v"),
    cost=_attention_cost,
    rows=_attention_rows,
    oracle=_attention_oracle,
)
# Packed sequences have one bias for all, by places in a sequence.
_ATTENTION_BY_PLACE = replace(
    _ATTENTION_BIAS, ours=_attention_by_place_ours, leaves=("qkv", "bias")
)

# ---- rows ----


def _make_rows(p: dict, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    m, n = p["M"], p["N"]
    draw = _normals(device, seed)
    inputs = {"x": draw(m, n).to(dtype)}
    inputs["weight"], inputs["bias"] = draw(2, n).to(dtype)
    if p.get("residual"):
        inputs["residual"] = draw(m, n).to(dtype)
    return inputs


def _layer_norm_ref(x: Inputs) -> Tensor:
    return layer_norm_ref(x["x"], x["weight"], x["bias"], 1e-12, x.get("residual"))


def _layer_norm_ours(x: Inputs) -> Tensor:
    return ops.layer_norm(x["x"], x["weight"], x["bias"], eps=1e-12, residual=x.get("residual"))


def _layer_norm_liger(device: str) -> Function:
    _needs("liger_kernel", device)
    from liger_kernel.transformers.functional import liger_layer_norm

    def run(x: Inputs) -> Tensor:
        rows = x["x"] if x.get("residual") is None else x["x"] + x["residual"]
        return liger_layer_norm(rows, x["weight"], x["bias"], 1e-12)

    return run


def _layer_norm_cost(p: dict, itemsize: int):
    size = (p["M"], p["N"], itemsize)
    residual = bool(p.get("residual"))
    return _cost.layernorm_cost(*size, residual=residual), _cost.layernorm_bwd_cost(*size)


_LAYER_NORM = _Op(
    make=_make_rows,
    reference=_layer_norm_ref,
    ours=_layer_norm_ours,
    others={
        EAGER: _eager(_layer_norm_ref),
        COMPILED: _compiled(_layer_norm_ref),
        LIGER: _layer_norm_liger,
    },
    leaves=("x", "weight", "bias"),
    cost=_layer_norm_cost,
)


def _softmax_ref(x: Inputs) -> Tensor:
    return softmax_ref(x["x"], None, 0.125)


def _softmax_liger(device: str) -> Function:
    _needs("liger_kernel", device)
    from liger_kernel.transformers.functional import liger_softmax

    return lambda x: liger_softmax(x["x"] * 0.125)


_SOFTMAX = _Op(
    make=_make_rows,
    reference=_softmax_ref,
    ours=lambda x: ops.softmax(x["x"], scale=0.125),
    others={
        EAGER: _eager(_softmax_ref),
        COMPILED: _compiled(_softmax_ref),
        LIGER: _softmax_liger,
    },
    leaves=("x",),
    cost=lambda p, itemsize: tuple(
        _cost.rows_cost(p["M"], p["N"], itemsize, tensors) for tensors in (2, 3)
    ),
)

# ---- embedding ----


def _make_embedding(p: dict, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    t, e = p["T"], p["E"]
    draw, generator = _normals(device, seed), torch.Generator().manual_seed(seed)
    sizes = {"word": 30522, "position": 512, "token_type": 2}
    tables = {k: draw(n, e).to(dtype) for k, n in sizes.items()}
    ids = {
        f"{k}_ids": torch.randint(0, n, (t,), generator=generator).to(device)
        for k, n in sizes.items()
    }
    weight, bias = draw(2, e).to(dtype)
    return {**tables, **ids, "weight": weight, "bias": bias}


def _embedding_args(x: Inputs) -> tuple[Tensor, ...]:
    names = ("word_ids", "position_ids", "token_type_ids", "word", "position", "token_type")
    return tuple(x[name] for name in (*names, "weight", "bias"))


def _embed_ref(x: Inputs) -> Tensor:
    return embed_ref(*_embedding_args(x), eps=1e-12)


_EMBEDDING = _Op(
    make=_make_embedding,
    reference=_embed_ref,
    ours=lambda x: ops.embed(*_embedding_args(x), eps=1e-12),
    others={EAGER: _eager(_embed_ref), COMPILED: _compiled(_embed_ref)},
    leaves=("word", "position", "token_type", "weight", "bias"),
    cost=lambda p, itemsize: (_cost.embedding_cost(p["T"], p["E"], itemsize),) * 2,
)

# ---- linear + GELU ----


def _make_linear(p: dict, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    m, n, k = p["M"], p["N"], p["K"]
    draw = _normals(device, seed)
    inputs = {"x": draw(m, k), "weight": draw(n, k) * k**-0.5, "bias": draw(n)}
    return {name: t.to(dtype) for name, t in inputs.items()}


def _linear_ref(x: Inputs) -> Tensor:
    return linear_ref(x["x"], x["weight"], x["bias"], "gelu")


def _linear_cost(p: dict, itemsize: int):
    forward = _cost.linear_cost(p["M"], p["N"], p["K"], itemsize)
    return forward, forward.times(2)


_LINEAR = _Op(
    make=_make_linear,
    reference=_linear_ref,
    ours=lambda x: ops.linear_gelu(x["x"], x["weight"], x["bias"]),
    others={EAGER: _eager(_linear_ref), COMPILED: _compiled(_linear_ref)},
    leaves=("x", "weight", "bias"),
    cost=_linear_cost,
)

OPS = {
    "attention": _ATTENTION,
    "attention, bias": _ATTENTION_BIAS,
    "attention, bias by place": _ATTENTION_BY_PLACE,
    "layer norm": _LAYER_NORM,
    "softmax": _SOFTMAX,
    "embedding": _EMBEDDING,
    "linear + GELU": _LINEAR,
}

# ---- one way to set them all up ----


class _Backward:
    """Times backward alone: the graph of each input set is built once, when it is first seen."""

    def __init__(self, function: Function, op: _Op):
        self.function, self.op = function, op
        self.graphs: dict[int, tuple[Tensor, list[Tensor], Tensor]] = {}

    def __call__(self, x: Inputs) -> tuple[Tensor, ...]:
        if id(x) not in self.graphs:
            self.graphs[id(x)] = self._forward(x)
        out, leaves, upstream = self.graphs[id(x)]
        return torch.autograd.grad(out, leaves, upstream, retain_graph=True)

    def _forward(self, x: Inputs):
        leaves = {name: x[name].detach().clone().requires_grad_() for name in self.op.leaves}
        x = {**x, **leaves}
        if "qkv" in leaves:  # padded providers share the leaf
            x |= _padded_views(x)
        out = self.function(x)
        out = self.op.rows(x, out)
        upstream = _normals(out.device.type, 7)(*out.shape).to(out.dtype)
        return out, list(leaves.values()), upstream


def _padded_views(x: Inputs) -> Inputs:
    """q, k and v ``[B, H, S, D]`` that pass their gradients on to the packed leaf."""
    qkv, keep = x["qkv"], x["keep"]
    if keep is None:
        padded = qkv.unflatten(0, (len(x["lengths"]), -1))
    else:
        padded = qkv.new_zeros(*keep.shape, *qkv.shape[1:]).index_put((keep,), qkv)
    return {name: padded[:, :, i].transpose(1, 2) for i, name in enumerate("qkv")}


def _wide(x: Inputs) -> Inputs:
    return {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in x.items()
    }


def _setup(workload: Workload, device: str) -> Prepared:
    name, _, direction = workload.op.rpartition(" ")
    op, params, dtype = OPS[name], workload.params, workload.dtype
    forward, backward = op.cost(params, dtype.itemsize)
    cost = forward if direction == "forward" else backward
    inputs = [op.make(params, dtype, device, seed) for seed in range(cold_sets(cost.bytes, device))]

    def timed(function: Function) -> Callable[[Inputs], Any]:
        if direction == "backward":
            return _Backward(function, op)
        return function

    def builder(build: Callable[[str], Function]):
        def make_run():
            run = timed(build(device))
            if direction == "backward":
                return run
            return lambda x: _without_gradient(run, x)

        return make_run

    expected: list[list[Tensor]] = []

    def outputs(result: Any) -> list[Tensor]:
        if direction == "backward":
            return list(result)
        return [op.rows(inputs[0], result)]

    def check(provider: str, result: Any) -> Check:
        if not expected:
            oracle = timed(op.oracle or op.reference)
            expected.append(outputs(oracle(_wide(inputs[0]))))
            expected.append(outputs(timed(op.reference)(inputs[0])))
        return checked_against(provider, outputs(result), *expected)

    return Prepared(
        inputs=inputs,
        providers={
            OURS: builder(_eager(op.ours)),
            **{name: builder(build) for name, build in op.others.items()},
        },
        check=check,
        cost=cost,
        tokens=sum(inputs[0]["lengths"]) if "lengths" in inputs[0] else _rows_of(params),
    )


def _without_gradient(function: Function, x: Inputs) -> Tensor:
    with torch.no_grad():
        return function(x)


def _rows_of(params: dict) -> int:
    return params.get("T", params.get("M", 0))


def kernel(
    op: str,
    *,
    direction: str = "forward",
    dtype: torch.dtype = torch.float32,
    suites: tuple[str, ...] = (),
    priority: int = 5,
    providers: tuple[str, ...] | None = None,
    **params: Any,
) -> Workload:
    """One operation of `OPS` in one direction, with its sizes by letter (B, S, H, D, M, N, ...)."""
    names = (OURS, *OPS[op].others)
    return Workload(
        f"{op} {direction}", "kernel", params, dtype, _setup,
        names if providers is None else providers, frozenset(suites), priority, EAGER,
    )  # fmt: skip
