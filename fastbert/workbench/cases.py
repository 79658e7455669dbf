"""Random cases of every kernel, and what each should give: what `fastbert.workbench.fuzz` runs.

A case is a flat dict of numbers, words and flags from which its tensors follow.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops import reference
from ..packing import PackedBatch
from ..testing import with_gradients

__all__ = ["DTYPES", "FUZZERS", "Case", "Fuzzer", "Result"]

Case = dict[str, Any]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Result(NamedTuple):
    """What a kernel gave, and how to find out what it should have given.

    Attributes:
        actual: one result or several.
        specification: of the arguments, as `fastbert.testing.assert_matches` wants it.
        arguments: of the specification.
        inside: the dtype that the kernel computes in before it rounds once, None where it stores
            16-bit values on the way, as torch does.
        others: other ways in which torch computes the same.
    """

    actual: Tensor | Sequence[Tensor]
    specification: Callable[..., Tensor | Sequence[Tensor]]
    arguments: Sequence[Any]
    inside: torch.dtype | None = torch.float32
    others: Sequence[Callable[..., Tensor | Sequence[Tensor]]] = ()


@dataclass(frozen=True)
class Fuzzer:
    """How to draw and run cases of one kernel.

    Attributes:
        draw: a case of a dtype from a random generator.
        run: (case, device) -> the results to be compared, by name.
        least: field -> the smallest value that makes sense; numbers not named go down to 1, those
            of lists to 0.
        makes_sense: whether a case that meets ``least`` does, where that depends on several fields.
    """

    draw: Callable[[random.Random, str], Case]
    run: Callable[[Case, str], dict[str, Result]]
    least: dict[str, int]
    makes_sense: Callable[[Case], bool] = lambda case: True


def _random(shape: tuple[int, ...], case: Case, device: str, scale: float = 1.0) -> Tensor:
    """Values of the case's scale and dtype; ``strided``: every other one of a larger tensor."""
    dtype, scale = DTYPES[case["dtype"]], case.get("magnitude", 1) * scale
    if case.get("strided") and len(shape) > 1:
        wide = torch.randn(shape[0], 2, *shape[1:]) * scale
        return wide.to(device, dtype)[:, 1]
    return (torch.randn(shape) * scale).to(device, dtype)


def _length(generator: random.Random, longest: int) -> int:
    """Small, at a tile's edge, or anything."""
    edges = [n for base in (16, 32, 64, 128) for n in (base - 1, base, base + 1) if n <= longest]
    return generator.choice([0, 1, generator.choice(edges), generator.randint(1, longest)])


def _far(generator: random.Random, dtype: str) -> int:
    """A factor beyond what fp16 holds, for the dtypes that hold it."""
    return 1 if dtype == "fp16" else generator.choice([1, 1, 1, 2**18])


def _upstream(shape: torch.Size | tuple[int, ...], case: Case, device: str) -> Tensor:
    return torch.randn(shape).to(device, DTYPES[case["dtype"]])


# ---- attention ----


def _draw_attention(generator: random.Random, dtype: str) -> Case:
    packed = generator.random() < 0.5
    lengths = [_length(generator, 200) for _ in range(generator.randint(1, 4))]
    return {
        "packed": packed,
        "lengths": lengths,
        "heads": generator.randint(1, 3),
        "head_size": generator.choice([8, 16, 32, 40, 64, 80, 96, 128]),
        "magnitude": generator.choice([1, 1, 8]),
        # In fp16 a result fits whose sum, before it is divided, does not.
        "values": generator.choice([1, 1, 1, 2**12]) if dtype == "fp16" else _far(generator, dtype),
        "strided": generator.random() < 0.5,
        "key_mask": not packed and generator.random() < 0.7,
        "bias": generator.random() < 0.4,
    }


def _draw_attention_bwd(generator: random.Random, dtype: str) -> Case:
    case = _draw_attention(generator, dtype)
    lengths = [max(2, n) if n != 0 or not case["packed"] else 0 for n in case["lengths"]]
    if not any(lengths):
        lengths[0] = 2
    case |= {"lengths": lengths, "magnitude": generator.choice([1, 1, 3])}
    if dtype == "fp16":
        case["values"] = 1  # gradients of the scores would be too large
    return {**case, "dropout": generator.choice([0, 0, 1, 10, 50])}


def _has_a_gradient(case: Case) -> bool:
    """Of q and k, whose gradient is nothing but rounding in sequences of one token."""
    lengths = case["lengths"]
    return any(lengths) and all(n >= 2 or (n == 0 and case["packed"]) for n in lengths)


def _attention_case(
    case: Case, device: str, dropout_p: float = 0.0
) -> tuple[Callable[..., Tensor], list[Callable[..., Tensor]], list[Tensor]]:
    """The op, its specification as math and as flash attention, and the tensors that all take: q,
    k, v and perhaps a bias."""
    from ..kernels._dropout import scores_kept

    lengths, h, d = case["lengths"], case["heads"], case["head_size"]
    b, longest = len(lengths), max(1, *lengths)
    drop, options = {}, {"operands": DTYPES[case["dtype"]]}
    values = case["values"] / case["magnitude"]  # v is of that size, whatever q and k are
    if dropout_p:
        drop = {"dropout_p": dropout_p, "seed": torch.tensor([case["seed"]], device=device)}
        options["kept"] = scores_kept(case["seed"], b, h, longest, longest, dropout_p).to(device)
    bias = []
    if case["bias"]:
        drawn = _random((1, h, longest, longest), {**case, "strided": False}, device)
        bias.append(drawn.transpose(2, 3) if case["strided"] else drawn)
    if case["packed"]:
        total = sum(lengths)
        bias = [t[0, :, : max(lengths), : max(lengths)] for t in bias]
        if case["strided"]:
            one = {**case, "strided": False}
            q, k, v = _random((total, 3, h, d), one, device).unbind(1)
            v = v * values
        else:
            q, k, v = (_random((total, h, d), case, device, s) for s in (1, 1, values))
        batch = PackedBatch.from_lengths(lengths, device=device)
        return (
            lambda q, k, v, bias=None: ops.attention_varlen(q, k, v, batch, bias=bias, **drop),
            [
                lambda q, k, v, bias=None, late=late: reference.attention_varlen_ref(
                    q, k, v, lengths, lengths, bias=bias, late_sum=late, **options
                )
                for late in (False, True)
            ],
            [q, k, v, *bias],
        )
    tensors = [_random((b, h, longest, d), case, device, s) for s in (1, 1, values)]
    mask = None
    if case["key_mask"]:
        mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).to(device)
    return (
        lambda q, k, v, bias=None: ops.attention(q, k, v, key_mask=mask, bias=bias, **drop),
        [
            lambda q, k, v, bias=None, late=late: reference.attention_ref(
                q, k, v, mask, bias, late_sum=late, **options
            )
            for late in (False, True)
        ],
        [*tensors, *bias],
    )


def _attention(case: Case, device: str) -> dict[str, Result]:
    run, (specification, other), tensors = _attention_case(case, device)
    return {"attention": Result(run(*tensors), specification, tensors, others=[other])}


def _attention_bwd(case: Case, device: str) -> dict[str, Result]:
    run, specified, tensors = _attention_case(case, device, case["dropout"] / 100)
    tensors = [_upstream(tensors[0].shape, case, device), *tensors]
    actual = with_gradients(run)(*tensors)
    specification, other = map(with_gradients, specified)
    return {"attention_bwd": Result(actual, specification, tensors, others=[other])}


# ---- rows ----


def _width(generator: random.Random, least: int = 1) -> int:
    width = generator.choice([1, 31, 32, 77, 128, 384, 768, 1024, generator.randint(1, 2048)])
    return max(least, width)


def _draw_layernorm(generator: random.Random, dtype: str) -> Case:
    return {
        "rows": generator.randint(1, 20),
        "width": _width(generator),
        "magnitude": generator.choice([1, 100]) * _far(generator, dtype),
        "strided": generator.random() < 0.5,
        "residual": generator.random() < 0.5,
        "input_bias": generator.random() < 0.5,
        "affine": generator.random() < 0.8,
    }


def _draw_layernorm_bwd(generator: random.Random, dtype: str) -> Case:
    case = _draw_layernorm(generator, dtype) | {"magnitude": 1, "width": _width(generator, 8)}
    return {**case, "dropout": generator.choice([0, 0, 1, 10, 50])}


def _layernorm_tensors(case: Case, device: str) -> list[Tensor | None]:
    """x, weight, bias, residual, input_bias."""
    m, n = case["rows"], case["width"]
    one = {**case, "magnitude": 1}
    return [
        _random((m, n), case, device),
        *(_random((n,), one, device) if case["affine"] else None for _ in range(2)),
        _random((m, n), case, device) if case["residual"] else None,
        _random((n,), case, device) if case["input_bias"] else None,
    ]


def _layernorm(case: Case, device: str) -> dict[str, Result]:
    def specification(x, weight, bias, residual, input_bias):
        return reference.layer_norm_ref(x, weight, bias, 1e-5, residual, input_bias)

    x, weight, bias, residual, input_bias = tensors = _layernorm_tensors(case, device)
    actual = ops.layer_norm(x, weight, bias, eps=1e-5, residual=residual, input_bias=input_bias)
    return {"layernorm": Result(actual, specification, tensors)}


def _layernorm_bwd(case: Case, device: str) -> dict[str, Result]:
    """The op's gradients, and the kernel by itself, which is given the sum and its statistics."""
    from ..kernels._dropout import values_kept
    from ..kernels.layernorm import layernorm_bwd

    m, n, p = case["rows"], case["width"], case["dropout"] / 100
    seed = torch.tensor([case["seed"]], device=device)
    kept = values_kept(case["seed"], m, n, p).to(device)

    def run(x, weight, bias, residual, input_bias):
        return ops.layer_norm(
            x, weight, bias, eps=1e-5, residual=residual, input_bias=input_bias, dropout_p=p,
            seed=seed,
        )  # fmt: skip

    def specification(x, weight, bias, residual, input_bias):
        return reference.layer_norm_ref(x, weight, bias, 1e-5, residual, input_bias, kept)

    def backward(dy, z, mean, rstd, weight):
        h = (z - mean[:, None]) * rstd[:, None]
        g = dy if weight is None else dy * weight
        dz = rstd[:, None] * (g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True))
        dx = dz * kept.to(dz)
        return [dx, *([dz] if p else []), (dy * h).sum(0), dy.sum(0), dx.sum(0)]

    tensors = [_upstream((m, n), case, device), *_layernorm_tensors(case, device)]
    actual = with_gradients(run)(*tensors)
    dy, z, weight = tensors[0], tensors[1].contiguous(), tensors[2]
    variance, mean = torch.var_mean(z.float(), -1, correction=0)
    statistics = torch.stack([mean, (variance + 1e-5).rsqrt()])
    dx, dresidual, sums = layernorm_bwd(
        dy, z, statistics, weight, dx_dtype=z.dtype, residual_dtype=z.dtype,
        sums=(True, True, True), dropout_p=p, seed=seed,
    )  # fmt: skip
    by_kernel = [dx, *([] if dresidual is None else [dresidual]), *sums]
    return {
        "layer_norm": Result(actual, with_gradients(specification), tensors, None),
        "layernorm_bwd": Result(by_kernel, backward, (dy, z, *statistics, weight)),
    }


def _draw_softmax(generator: random.Random, dtype: str) -> Case:
    return {
        "rows": generator.randint(1, 40),
        "width": _width(generator),
        "magnitude": generator.choice([1, 30]),
        "strided": generator.random() < 0.5,
        "mask": generator.choice(["none", "bool", "additive"]),
    }


def _draw_softmax_bwd(generator: random.Random, dtype: str) -> Case:
    return _draw_softmax(generator, dtype) | {"magnitude": 1, "width": _width(generator, 8)}


def _softmax(case: Case, device: str) -> dict[str, Result]:
    m, n = case["rows"], case["width"]
    x = _random((m, n), case, device)
    mask = None
    if case["mask"] == "bool":
        mask = (torch.rand(m, n) < 0.7).to(device)
    elif case["mask"] == "additive":
        mask = torch.where(torch.rand(m, n) < 0.7, 0.0, -math.inf).to(device, x.dtype)
    actual = ops.softmax(x, mask=mask, scale=0.25)

    def specification(x: Tensor, mask: Tensor | None) -> Tensor:
        return reference.softmax_ref(x, mask, 0.25)

    return {"softmax": Result(actual, specification, (x, mask))}


def _softmax_bwd(case: Case, device: str) -> dict[str, Result]:
    """The op's gradients, and the kernel by itself, which is given the result."""
    from ..kernels.softmax import softmax_bwd

    m, n = case["rows"], case["width"]
    keep = (torch.rand(m, n) < 0.7).to(device) if case["mask"] == "bool" else None
    mask = _random((m, n), case, device) if case["mask"] == "additive" else None
    x, dy = _random((m, n), case, device), _upstream((m, n), case, device)
    actual = with_gradients(
        lambda x, mask: ops.softmax(x, mask=keep if mask is None else mask, scale=0.25)
    )(dy, x, mask)
    specification = with_gradients(
        lambda x, mask: reference.softmax_ref(x, keep if mask is None else mask, 0.25)
    )

    def backward(dy: Tensor, y: Tensor) -> Tensor:
        return y * (dy - (y * dy).sum(-1, keepdim=True)) * 0.25

    y = actual[0]
    return {
        "softmax": Result(actual, specification, (dy, x, mask), None),
        "softmax_bwd": Result(softmax_bwd(dy, y, scale=0.25), backward, (dy, y)),
    }


def _draw_embedding(generator: random.Random, dtype: str) -> Case:
    return {
        "tokens": generator.randint(1, 20),
        "width": _width(generator),
        "magnitude": _far(generator, dtype),
        "types": generator.random() < 0.7,
        "strided": generator.random() < 0.5,
    }


def _embedding(case: Case, device: str) -> dict[str, Result]:
    t, n = case["tokens"], case["width"]
    word, position, token_type = (_random((rows, n), case, device) for rows in (97, 33, 2))
    ids = [torch.randint(0, rows, (t,), device=device) for rows in (97, 33, 2)]
    if not case["types"]:
        token_type = ids[2] = None
    weight, bias = (_random((n,), {**case, "magnitude": 1}, device) for _ in range(2))
    actual = ops.embed(*ids, word, position, token_type, weight, bias, eps=1e-5)

    def specification(*tables: Tensor | None) -> Tensor:
        return reference.embed_ref(*ids, *tables, eps=1e-5)

    return {"embedding": Result(actual, specification, (word, position, token_type, weight, bias))}


# ---- linear ----


def _draw_linear(generator: random.Random, dtype: str) -> Case:
    return {
        "rows": generator.randint(1, 150),
        "outputs": generator.choice([1, 16, 96, 130]),
        "inputs": generator.choice([1, 16, 33, 64, 200]),
        "activation": generator.choice(["gelu", "gelu_tanh", "relu", "silu"]),
        "magnitude": generator.choice([1, 4]) * _far(generator, dtype),
        "strided": generator.random() < 0.5,
        "bias": generator.random() < 0.8,
    }


def _linear_tensors(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    m, n, k = case["rows"], case["outputs"], case["inputs"]
    x = _random((m, k), case, device)
    weight = _random((n, k), {**case, "magnitude": k**-0.5}, device)
    return x, weight, _random((n,), case, device) if case["bias"] else None


def _linear(case: Case, device: str) -> dict[str, Result]:
    from ..kernels.linear import linear_activation_fwd

    x, weight, bias = tensors = _linear_tensors(case, device)
    actual = linear_activation_fwd(x, weight, bias, activation=case["activation"])

    def specification(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference.linear_ref(x, weight, bias, case["activation"])

    return {"linear": Result(actual, specification, tensors)}


def _bias_activation(case: Case, device: str) -> dict[str, Result]:
    from ..kernels.linear import bias_activation_fwd_

    x = _random((case["rows"], case["outputs"]), case, device)
    bias = _random((case["outputs"],), case, device) if case["bias"] else None
    actual = bias_activation_fwd_(x.clone(), bias, activation=case["activation"])

    def specification(x: Tensor, bias: Tensor | None) -> Tensor:
        return reference.bias_activation_ref(x, bias, case["activation"])

    return {"bias_activation": Result(actual, specification, (x, bias))}


def _activation_bwd(case: Case, device: str) -> dict[str, Result]:
    """The gradients of a linear layer, and the kernel by itself, given the pre-activation."""
    from ..kernels.linear import activation_bwd

    activation, tensors = case["activation"], _linear_tensors(case, device)
    z = F.linear(*tensors)
    dy = _upstream(z.shape, case, device)
    actual = with_gradients(lambda *tensors: ops.linear(*tensors, activation=activation))(
        dy, *tensors
    )
    specification = with_gradients(lambda *tensors: reference.linear_ref(*tensors, activation))

    def backward(dy: Tensor, z: Tensor) -> list[Tensor]:
        y, dz = with_gradients(lambda z: reference.bias_activation_ref(z, None, activation))(dy, z)
        return [dz, y, dz.sum(0)]

    by_kernel = activation_bwd(dy, z, activation=activation, bias_dtype=torch.float32, again=True)
    return {
        "linear": Result(actual, specification, (dy, *tensors), None),
        "activation_bwd": Result(by_kernel, backward, (dy, z)),
    }


# ---- cross-entropy ----


def _draw_cross_entropy(generator: random.Random, dtype: str) -> Case:
    return {
        "rows": generator.randint(1, 20),
        "vocabulary": generator.choice([8, 33, 128, 1000, 4097, generator.randint(8, 9000)]),
        "magnitude": generator.choice([1, 10]),
        "bias": generator.random() < 0.5,
        "smoothing": generator.random() < 0.3,
    }


def _cross_entropy(case: Case, device: str) -> dict[str, Result]:
    """Losses, and the gradients that take the place of the logits."""
    from ..kernels.cross_entropy import PADDED_TO, cross_entropy_

    m, v = case["rows"], case["vocabulary"]
    x, smoothing = _random((m, v), case, device), 0.1 if case["smoothing"] else 0.0
    bias = _random((v,), case, device) if case["bias"] else None
    labels = torch.randint(0, v, (m,), device=device)

    def specification(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        logits = leaf if bias is None else leaf + bias
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]

    padded = F.pad(x, (0, -v % PADDED_TO), value=float("nan"))
    losses, _ = cross_entropy_(padded, bias, labels, classes=v, smoothing=smoothing, gradient=True)
    gradient = padded[:, :v]
    return {"cross_entropy": Result((losses, gradient), specification, (x, bias))}


FUZZERS = {
    "attention": Fuzzer(_draw_attention, _attention, {"head_size": 8}),
    "attention_bwd": Fuzzer(
        _draw_attention_bwd,
        _attention_bwd,
        {"head_size": 8, "lengths": 2, "dropout": 0},
        _has_a_gradient,
    ),
    "softmax": Fuzzer(_draw_softmax, _softmax, {}),
    "softmax_bwd": Fuzzer(_draw_softmax_bwd, _softmax_bwd, {"width": 8}),
    "layernorm": Fuzzer(_draw_layernorm, _layernorm, {}),
    "layernorm_bwd": Fuzzer(_draw_layernorm_bwd, _layernorm_bwd, {"width": 8, "dropout": 0}),
    "embedding": Fuzzer(_draw_embedding, _embedding, {}),
    "linear": Fuzzer(_draw_linear, _linear, {}),
    "bias_activation": Fuzzer(_draw_linear, _bias_activation, {}),
    "activation_bwd": Fuzzer(_draw_linear, _activation_bwd, {}),
    "cross_entropy": Fuzzer(_draw_cross_entropy, _cross_entropy, {"vocabulary": 8}),
}
