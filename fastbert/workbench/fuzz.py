"""Randomised parity: a kernel against its reference over shapes, dtypes, strides and masks.

A case is a flat dict of numbers, words and flags from which its tensors follow, so that a failure
can be printed, made smaller, and run again. Kernels run on a GPU, or through Triton's interpreter.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops import reference
from ..ops.backend import backend
from ..packing import PackedBatch
from ..testing import assert_within_budget

__all__ = ["FUZZERS", "Failure", "Fuzzer", "check", "run_case"]

Case = dict[str, Any]
_Compared = tuple[Tensor, Tensor, Tensor]
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Fuzzer:
    """How to draw and run cases of one kernel.

    Attributes:
        draw: a case from a random generator.
        outputs: (case, device) -> (what the kernel gave, in fp64, by torch in the case's dtype), or
            several of these by name.
        least: field -> the smallest value that makes sense; numbers not named go down to 1.
    """

    draw: Callable[[random.Random], Case]
    outputs: Callable[[Case, str], _Compared | dict[str, _Compared]]
    least: dict[str, int]


@dataclass(frozen=True)
class Failure:
    """The smallest case found that fails, and how."""

    kernel: str
    case: Case
    error: str
    cases_run: int


def run_case(kernel: str, case: Case, device: str) -> None:
    """Run one case.

    Raises:
        AssertionError: over the budget of `fastbert.testing.assert_within_budget`.
        Exception: whatever the kernel raises.
    """
    torch.manual_seed(case["seed"])
    with backend("triton"):
        outputs = FUZZERS[kernel].outputs(case, device)
    if isinstance(outputs, tuple):
        outputs = {kernel: outputs}
    for name, (actual, oracle, baseline) in outputs.items():
        assert_within_budget(actual, oracle, baseline, name)


def check(kernel: str, *, seconds: float, device: str, seed: int = 0) -> Failure | int:
    """Run random cases until the time is up or one fails; a failing one is made smaller.

    Returns:
        A `Failure`, or how many cases passed.
    """
    generator = random.Random(seed)
    end, count = time.monotonic() + seconds, 0
    while count == 0 or time.monotonic() < end:
        case = FUZZERS[kernel].draw(generator) | {"seed": generator.randrange(2**31)}
        count += 1
        error = _error(kernel, case, device)
        if error is not None:
            case, error = _shrink(kernel, case, error, device)
            return Failure(kernel, case, error, count)
    return count


def _error(kernel: str, case: Case, device: str) -> str | None:
    try:
        run_case(kernel, case, device)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def _smaller(kernel: str, case: Case) -> Iterator[Case]:
    """Cases one step simpler: flags off, numbers smaller."""
    for key, value in case.items():
        if key in ("seed", "dtype"):
            continue
        if value is True:
            yield {**case, key: False}
        elif isinstance(value, int) and not isinstance(value, bool):
            least = FUZZERS[kernel].least.get(key, 1)
            for fewer in dict.fromkeys((least, value // 2, value - 1)):
                if least <= fewer < value:
                    yield {**case, key: fewer}
        elif isinstance(value, list):
            for i in range(len(value)):
                if len(value) > 1:
                    yield {**case, key: value[:i] + value[i + 1 :]}
                for fewer in dict.fromkeys((value[i] // 2, value[i] - 1)):
                    if 0 <= fewer < value[i]:
                        yield {**case, key: [*value[:i], fewer, *value[i + 1 :]]}


def _shrink(kernel: str, case: Case, error: str, device: str) -> tuple[Case, str]:
    """Steps to a simpler failing case until no step fails any more, or half a minute has passed."""
    end = time.monotonic() + 30
    progress = True
    while progress and time.monotonic() < end:
        progress = False
        for candidate in _smaller(kernel, case):
            found = _error(kernel, candidate, device)
            if found is not None:
                case, error, progress = candidate, found, True
                break
    return case, error


def _random(shape: tuple[int, ...], case: Case, device: str) -> Tensor:
    """Values of the case's scale and dtype; ``strided``: every other one of a larger tensor."""
    dtype, scale = _DTYPES[case["dtype"]], case.get("magnitude", 1)
    if case.get("strided") and len(shape) > 1:
        wide = torch.randn(shape[0], 2, *shape[1:]) * scale
        return wide.to(device, dtype)[:, 1]
    return (torch.randn(shape) * scale).to(device, dtype)


def _wide(*values: Any) -> list[Any]:
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


def _length(generator: random.Random, longest: int) -> int:
    """Small, at a tile's edge, or anything."""
    edges = [n for base in (16, 32, 64, 128) for n in (base - 1, base, base + 1) if n <= longest]
    return generator.choice([0, 1, generator.choice(edges), generator.randint(1, longest)])


def _dtype(generator: random.Random) -> str:
    return generator.choice(list(_DTYPES))


# ---- attention ----


def _draw_attention(generator: random.Random) -> Case:
    packed = generator.random() < 0.5
    lengths = [_length(generator, 200) for _ in range(generator.randint(1, 4))]
    return {
        "packed": packed,
        "lengths": lengths,
        "heads": generator.randint(1, 3),
        "head_size": generator.choice([8, 16, 32, 40, 64, 80, 96, 128]),
        "dtype": _dtype(generator),
        "magnitude": generator.choice([1, 1, 8]),
        "strided": generator.random() < 0.5,
        "key_mask": not packed and generator.random() < 0.7,
        "bias": not packed and generator.random() < 0.4,
    }


def _attention(case: Case, device: str) -> _Compared:
    lengths, h, d = case["lengths"], case["heads"], case["head_size"]
    if case["packed"]:
        total = sum(lengths)
        shape = (total, 3, h, d) if case["strided"] else (3, total, h, d)
        q, k, v = _random(shape, {**case, "strided": False}, device).unbind(
            1 if case["strided"] else 0
        )
        batch = PackedBatch.from_lengths(lengths, device=device)
        actual = ops.attention_varlen(q, k, v, batch)
        if total == 0:
            return actual, actual, actual
        exact = reference.attention_varlen_ref(*_wide(q, k, v), lengths, lengths)
        return (
            actual,
            exact,
            _worst(
                exact, q, k, lambda q, k: reference.attention_varlen_ref(q, k, v, lengths, lengths)
            ),
        )
    b, s = len(lengths), max(1, *lengths)
    q, k, v = (_random((b, h, s, d), case, device) for _ in range(3))
    mask = bias = None
    if case["key_mask"]:
        mask = (torch.arange(s) < torch.tensor(lengths)[:, None]).to(device)
    if case["bias"]:
        bias = _random((1, h, s, s), {**case, "strided": False}, device)
    actual = ops.attention(q, k, v, key_mask=mask, bias=bias)
    exact = reference.attention_ref(*_wide(q, k, v, mask, bias))
    return (
        actual,
        exact,
        _worst(exact, q, k, lambda q, k: reference.attention_ref(q, k, v, mask, bias)),
    )


def _worst(
    exact: Tensor, q: Tensor, k: Tensor, attend: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """torch's result with the largest error over some orders of summation within a head.

    On a few values with large scores, torch's error in one order is luck: it can be a tenth of what
    it is in another, and no kernel could be held to it.
    """
    results = [attend(q, k)]
    for _ in range(5):
        order = torch.randperm(q.shape[-1], device=q.device)
        results.append(attend(q[..., order], k[..., order]))
    return _farthest(results, exact)


def _farthest(results: list[Tensor], exact: Tensor) -> Tensor:
    """The one with the largest error."""
    return max(results, key=lambda r: (r.double() - exact).abs().nan_to_num().max().item())


# ---- rows ----


def _width(generator: random.Random) -> int:
    return generator.choice([1, 31, 32, 77, 128, 384, 768, 1024, generator.randint(1, 2048)])


def _draw_layernorm(generator: random.Random) -> Case:
    return {
        "rows": generator.randint(1, 20),
        "width": _width(generator),
        "dtype": _dtype(generator),
        "magnitude": generator.choice([1, 100]),
        "strided": generator.random() < 0.5,
        "residual": generator.random() < 0.5,
        "input_bias": generator.random() < 0.5,
        "affine": generator.random() < 0.8,
    }


def _layernorm(case: Case, device: str) -> _Compared:
    m, n = case["rows"], case["width"]
    x = _random((m, n), case, device)
    residual = _random((m, n), case, device) if case["residual"] else None
    input_bias = _random((n,), case, device) if case["input_bias"] else None
    weight, bias = (_random((n,), case, device) if case["affine"] else None for _ in range(2))
    arguments = (x, weight, bias, 1e-5, residual, input_bias)
    actual = ops.layer_norm(x, weight, bias, eps=1e-5, residual=residual, input_bias=input_bias)
    exact = reference.layer_norm_ref(*_wide(*arguments))
    return actual, exact, reference.layer_norm_ref(*arguments)


def _draw_softmax(generator: random.Random) -> Case:
    return {
        "rows": generator.randint(1, 40),
        "width": _width(generator),
        "dtype": _dtype(generator),
        "magnitude": generator.choice([1, 30]),
        "strided": generator.random() < 0.5,
        "mask": generator.choice(["none", "bool", "additive"]),
    }


def _softmax(case: Case, device: str) -> _Compared:
    m, n = case["rows"], case["width"]
    x = _random((m, n), case, device)
    mask = None
    if case["mask"] == "bool":
        mask = (torch.rand(m, n) < 0.7).to(device)
    elif case["mask"] == "additive":
        mask = torch.where(torch.rand(m, n) < 0.7, 0.0, -math.inf).to(device, x.dtype)
    actual = ops.softmax(x, mask=mask, scale=0.25)
    exact = reference.softmax_ref(x.double(), *_wide(mask), 0.25)
    return actual, exact, reference.softmax_ref(x, mask, 0.25)


def _draw_embedding(generator: random.Random) -> Case:
    return {
        "tokens": generator.randint(1, 20),
        "width": _width(generator),
        "dtype": _dtype(generator),
        "types": generator.random() < 0.7,
        "strided": generator.random() < 0.5,
    }


def _embedding(case: Case, device: str) -> _Compared:
    t, n = case["tokens"], case["width"]
    word, position, token_type = (_random((rows, n), case, device) for rows in (97, 33, 2))
    ids = [torch.randint(0, rows, (t,), device=device) for rows in (97, 33, 2)]
    if not case["types"]:
        token_type = ids[2] = None
    weight, bias = (_random((n,), case, device) for _ in range(2))
    arguments = (*ids, word, position, token_type, weight, bias)
    actual = ops.embed(*arguments, eps=1e-5)
    exact = reference.embed_ref(*_wide(*arguments), eps=1e-5)
    return actual, exact, reference.embed_ref(*arguments, eps=1e-5)


# ---- linear ----


def _draw_linear(generator: random.Random) -> Case:
    return {
        "rows": generator.randint(1, 150),
        "outputs": generator.choice([1, 16, 96, 130]),
        "inputs": generator.choice([1, 16, 33, 64, 200]),
        "activation": generator.choice(["gelu", "gelu_tanh", "relu", "silu"]),
        "dtype": _dtype(generator),
        "magnitude": generator.choice([1, 4]),
        "strided": generator.random() < 0.5,
        "bias": generator.random() < 0.8,
    }


def _linear_tensors(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    m, n, k = case["rows"], case["outputs"], case["inputs"]
    x = _random((m, k), case, device)
    weight = _random((n, k), {**case, "magnitude": k**-0.5}, device)
    return x, weight, _random((n,), case, device) if case["bias"] else None


def _linear(case: Case, device: str) -> _Compared:
    from ..kernels.linear import linear_activation_fwd

    x, weight, bias = _linear_tensors(case, device)
    activation = case["activation"]
    actual = linear_activation_fwd(x, weight, bias, activation=activation)
    exact = reference.linear_ref(*_wide(x, weight, bias), activation)
    return actual, exact, reference.linear_ref(x, weight, bias, activation)


def _bias_activation(case: Case, device: str) -> _Compared:
    from ..kernels.linear import bias_activation_fwd_

    x = _random((case["rows"], case["outputs"]), case, device)
    bias = _random((case["outputs"],), case, device) if case["bias"] else None
    exact = reference.bias_activation_ref(*_wide(x, bias), case["activation"])
    torchs = reference.bias_activation_ref(x, bias, case["activation"])
    return bias_activation_fwd_(x, bias, activation=case["activation"]), exact, torchs


# ---- gradients ----


def _gradients(
    run: Callable[..., Tensor],
    specification: Callable[..., Tensor],
    tensors: dict[str, Tensor | None],
    rows: tuple[str, ...] = (),
    **constants: Tensor,
) -> dict[str, _Compared]:
    """The gradient of every tensor that is there, for a random upstream gradient.

    Args:
        rows: tensors whose rows may change places together with those of the constants and of the
            upstream gradient. Others are then sums over rows, and torch is taken at its worst of
            some orders, for the reason that `_worst` gives.
        constants: for the specification alone.
    """
    given = {name: t for name, t in tensors.items() if t is not None}
    first = next(iter(given.values()))
    dtype = first.dtype
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    out = run(**leaves)
    upstream = torch.randn(out.shape).to(out)
    actual = torch.autograd.grad(out, list(leaves.values()), upstream)

    def specified(kind: torch.dtype, order: Tensor | None = None) -> list[Tensor]:
        def moved(name: str, t: Tensor) -> Tensor:
            return t if order is None or name not in (*rows, *constants) else t[order]

        leaves = {n: moved(n, t).detach().to(kind).requires_grad_() for n, t in given.items()}
        out = specification(**leaves, **{n: moved(n, t) for n, t in constants.items()})
        weights = upstream if order is None else upstream[order]
        grads = torch.autograd.grad(out, list(leaves.values()), weights.to(kind))
        if order is None:
            return list(grads)
        back = order.argsort()
        return [g[back] if n in rows else g for n, g in zip(given, grads, strict=True)]

    exact = specified(torch.float64)
    torchs = [specified(dtype)]
    if rows:
        size = first.shape[0]
        torchs += [specified(dtype, torch.randperm(size, device=first.device)) for _ in range(5)]
    return {
        f"gradient of {name}": (actual[i], exact[i], _farthest([t[i] for t in torchs], exact[i]))
        for i, name in enumerate(given)
    }


def _draw_attention_bwd(generator: random.Random) -> Case:
    case = _draw_attention(generator)
    lengths = [max(2, n) if n != 0 or not case["packed"] else 0 for n in case["lengths"]]
    if not any(lengths):
        lengths[0] = 2
    return {
        **case,
        "lengths": lengths,
        "magnitude": 1,
        "dropout": generator.choice([0, 0, 1, 10, 50]),
    }


def _attention_bwd(case: Case, device: str) -> dict[str, _Compared]:
    """With dropout in per cent; one-token sequences are left out: their q and k have no gradient
    but rounding, which no budget follows from."""
    from ..kernels._dropout import scores_kept

    lengths, h, d, p = case["lengths"], case["heads"], case["head_size"], case["dropout"] / 100
    seed = torch.tensor([case["seed"]], device=device)
    if case["packed"]:
        total, longest = sum(lengths), max(lengths)
        q, k, v = (_random((total, h, d), case, device) for _ in range(3))
        batch = PackedBatch.from_lengths(lengths, device=device)
        kept = scores_kept(case["seed"], len(lengths), h, longest, longest, p).to(device)
        return _gradients(
            lambda q, k, v: ops.attention_varlen(q, k, v, batch, dropout_p=p, seed=seed),
            lambda q, k, v: reference.attention_varlen_ref(q, k, v, lengths, lengths, kept=kept),
            {"q": q, "k": k, "v": v},
        )
    b, s = len(lengths), max(2, *lengths)
    kept = scores_kept(case["seed"], b, h, s, s, p).to(device)
    tensors = {name: _random((b, h, s, d), case, device) for name in "qkv"}
    tensors["bias"] = None
    mask = None
    if case["key_mask"]:
        mask = (torch.arange(s) < torch.tensor(lengths)[:, None]).to(device)
    if case["bias"]:
        tensors["bias"] = _random((1, h, s, s), {**case, "strided": False}, device)
    return _gradients(
        lambda q, k, v, bias=None: ops.attention(
            q, k, v, key_mask=mask, bias=bias, dropout_p=p, seed=seed
        ),
        lambda q, k, v, bias=None: reference.attention_ref(q, k, v, mask, bias, kept=kept),
        tensors,
    )


def _draw_layernorm_bwd(generator: random.Random) -> Case:
    case = {**_draw_layernorm(generator), "magnitude": 1}
    return {**case, "width": max(8, case["width"]), "dropout": generator.choice([0, 0, 1, 10, 50])}


def _layernorm_bwd(case: Case, device: str) -> dict[str, _Compared]:
    from ..kernels._dropout import values_kept

    m, n, p = case["rows"], case["width"], case["dropout"] / 100
    seed = torch.tensor([case["seed"]], device=device)
    kept = values_kept(case["seed"], m, n, p).to(device)

    def run(x, residual=None, input_bias=None, weight=None, bias=None):
        return ops.layer_norm(
            x, weight, bias, eps=1e-5, residual=residual, input_bias=input_bias, dropout_p=p,
            seed=seed,
        )  # fmt: skip

    def specification(x, residual=None, input_bias=None, weight=None, bias=None, *, kept):
        return reference.layer_norm_ref(x, weight, bias, 1e-5, residual, input_bias, kept)

    return _gradients(
        run,
        specification,
        {
            "x": _random((m, n), case, device),
            "residual": _random((m, n), case, device) if case["residual"] else None,
            "input_bias": _random((n,), case, device) if case["input_bias"] else None,
            "weight": _random((n,), case, device) if case["affine"] else None,
            "bias": _random((n,), case, device) if case["affine"] else None,
        },
        rows=("x", "residual"),
        kept=kept,
    )


def _draw_softmax_bwd(generator: random.Random) -> Case:
    case = {**_draw_softmax(generator), "magnitude": 1}
    return {**case, "width": max(8, case["width"])}


def _softmax_bwd(case: Case, device: str) -> dict[str, _Compared]:
    m, n = case["rows"], case["width"]
    keep = (torch.rand(m, n) < 0.7).to(device) if case["mask"] == "bool" else None
    mask = _random((m, n), case, device) if case["mask"] == "additive" else None
    return _gradients(
        lambda x, mask=None: ops.softmax(x, mask=keep if mask is None else mask, scale=0.25),
        lambda x, mask=None: reference.softmax_ref(x, keep if mask is None else mask, 0.25),
        {"x": _random((m, n), case, device), "mask": mask},
    )


def _activation_bwd(case: Case, device: str) -> dict[str, _Compared]:
    x, weight, bias = _linear_tensors(case, device)
    activation = case["activation"]
    return _gradients(
        lambda x, weight, bias=None: ops.linear(x, weight, bias, activation=activation),
        lambda x, weight, bias=None: reference.linear_ref(x, weight, bias, activation),
        {"x": x, "weight": weight, "bias": bias},
        rows=("x",),
    )


def _draw_cross_entropy(generator: random.Random) -> Case:
    return {
        "rows": generator.randint(1, 20),
        "vocabulary": generator.choice([8, 33, 128, 1000, 4097, generator.randint(8, 9000)]),
        "dtype": _dtype(generator),
        "magnitude": generator.choice([1, 10]),
        "bias": generator.random() < 0.5,
        "smoothing": generator.random() < 0.3,
    }


def _cross_entropy(case: Case, device: str) -> dict[str, _Compared]:
    """Losses, and the gradients that take the place of the logits."""
    from ..kernels.cross_entropy import cross_entropy_

    m, v = case["rows"], case["vocabulary"]
    x, smoothing = _random((m, v), case, device), 0.1 if case["smoothing"] else 0.0
    bias = _random((v,), case, device) if case["bias"] else None
    labels = torch.randint(0, v, (m,), device=device)

    def specification(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = x.to(dtype).requires_grad_()
        logits = leaf if bias is None else leaf + bias.to(dtype)
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]

    gradient = x.clone()
    losses = cross_entropy_(gradient, bias, labels, smoothing=smoothing, gradient=True)
    exact, torchs = specification(torch.float64), specification(x.dtype)
    return {
        "losses": (losses.to(x.dtype), exact[0], torchs[0]),
        "gradients": (gradient, exact[1], torchs[1]),
    }


FUZZERS = {
    "attention": Fuzzer(_draw_attention, _attention, {"head_size": 8}),
    "attention_bwd": Fuzzer(
        _draw_attention_bwd, _attention_bwd, {"head_size": 8, "lengths": 2, "dropout": 0}
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
