"""Single operations, forward and backward, each against every implementation that runs here.

An operation is an `Op`: how its inputs are made, its reference, what others call, its least work.
Those on rows are here. Every provider sees the same values, in the layout it wants; outputs are
brought to one layout before they are compared with the reference in fp64, outside of what is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastbert.kernels import _cost
from torch import Tensor

from fastbert import ops
from fastbert.ops.reference import embed_ref, layer_norm_ref, linear_ref, softmax_ref

from .attention_operations import ATTENTION, ATTENTION_BIAS, ATTENTION_BY_PLACE, padded_views
from .operations import (
    COMPILED,
    EAGER,
    LIGER,
    Function,
    Inputs,
    Op,
    compiled,
    eager,
    needs,
    normals,
)  # fmt: skip
from .results import Check
from .timing import cold_sets
from .workload import OURS, Prepared, Workload, checked_against

__all__ = ["OPS", "kernel"]

# ---- rows ----


def _make_rows(p: dict, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    m, n = p["M"], p["N"]
    draw = normals(device, seed)
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
    needs("liger_kernel", device)
    from liger_kernel.transformers.functional import liger_layer_norm

    def run(x: Inputs) -> Tensor:
        rows = x["x"] if x.get("residual") is None else x["x"] + x["residual"]
        return liger_layer_norm(rows, x["weight"], x["bias"], 1e-12)

    return run


def _layer_norm_cost(p: dict, itemsize: int):
    size = (p["M"], p["N"], itemsize)
    residual = bool(p.get("residual"))
    return _cost.layernorm_cost(*size, residual=residual), _cost.layernorm_bwd_cost(*size)


_LAYER_NORM = Op(
    make=_make_rows,
    reference=_layer_norm_ref,
    ours=_layer_norm_ours,
    others={
        EAGER: eager(_layer_norm_ref),
        COMPILED: compiled(_layer_norm_ref),
        LIGER: _layer_norm_liger,
    },
    leaves=("x", "weight", "bias"),
    cost=_layer_norm_cost,
)


def _softmax_ref(x: Inputs) -> Tensor:
    return softmax_ref(x["x"], None, 0.125)


def _softmax_liger(device: str) -> Function:
    needs("liger_kernel", device)
    from liger_kernel.transformers.functional import liger_softmax

    return lambda x: liger_softmax(x["x"] * 0.125)


_SOFTMAX = Op(
    make=_make_rows,
    reference=_softmax_ref,
    ours=lambda x: ops.softmax(x["x"], scale=0.125),
    others={
        EAGER: eager(_softmax_ref),
        COMPILED: compiled(_softmax_ref),
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
    draw, generator = normals(device, seed), torch.Generator().manual_seed(seed)
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


_EMBEDDING = Op(
    make=_make_embedding,
    reference=_embed_ref,
    ours=lambda x: ops.embed(*_embedding_args(x), eps=1e-12),
    others={EAGER: eager(_embed_ref), COMPILED: compiled(_embed_ref)},
    leaves=("word", "position", "token_type", "weight", "bias"),
    cost=lambda p, itemsize: (_cost.embedding_cost(p["T"], p["E"], itemsize),) * 2,
)

# ---- linear + GELU ----


def _make_linear(p: dict, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    m, n, k = p["M"], p["N"], p["K"]
    draw = normals(device, seed)
    inputs = {"x": draw(m, k), "weight": draw(n, k) * k**-0.5, "bias": draw(n)}
    return {name: t.to(dtype) for name, t in inputs.items()}


def _linear_ref(x: Inputs) -> Tensor:
    return linear_ref(x["x"], x["weight"], x["bias"], "gelu")


def _linear_cost(p: dict, itemsize: int):
    forward = _cost.linear_cost(p["M"], p["N"], p["K"], itemsize)
    return forward, forward.times(2)


_LINEAR = Op(
    make=_make_linear,
    reference=_linear_ref,
    ours=lambda x: ops.linear_gelu(x["x"], x["weight"], x["bias"]),
    others={EAGER: eager(_linear_ref), COMPILED: compiled(_linear_ref)},
    leaves=("x", "weight", "bias"),
    cost=_linear_cost,
)

OPS = {
    "attention": ATTENTION,
    "attention, bias": ATTENTION_BIAS,
    "attention, bias by place": ATTENTION_BY_PLACE,
    "layer norm": _LAYER_NORM,
    "softmax": _SOFTMAX,
    "embedding": _EMBEDDING,
    "linear + GELU": _LINEAR,
}

# ---- one way to set them all up ----


class _Backward:
    """Times backward alone: the graph of each input set is built once, when it is first seen."""

    def __init__(self, function: Function, op: Op):
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
            x |= padded_views(x)
        out = self.function(x)
        out = self.op.rows(x, out)
        upstream = normals(out.device.type, 7)(*out.shape).to(out.dtype)
        return out, list(leaves.values()), upstream


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
            OURS: builder(eager(op.ours)),
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
