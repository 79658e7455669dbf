"""Every workload there is, by suite and device. What a suite runs is decided here and nowhere else.

Suites: ``smoke`` (tiny, for the tests of this suite), ``quick`` (a first impression in a minute or
two), ``targets`` (what the project promises, row by row), ``kernels`` and ``models`` (the breadth).
Within a suite the most important workloads come first, since a run may be cut short.
"""

from __future__ import annotations

import torch

from .attention_operations import FLASH_ATTN, SDPA, VARLEN
from .encoders import (
    BASELINE,
    COMPILED,
    CTRANSLATE2,
    EAGER,
    FREEZING,
    INFERENCE,
    OPENVINO,
    ORT,
    OWN_FROZEN,
    OWN_PADDED,
    TORCH_ENCODER,
)
from .kernel_workloads import kernel
from .model_workloads import encode_texts, every_length, inference, training_step
from .operations import EAGER as TORCH_EAGER
from .shapes import LENGTHS
from .workload import OURS, Workload

__all__ = ["SUITES", "workloads"]

SUITES = ("smoke", "quick", "targets", "kernels", "models")
_RAGGED = tuple(name for name in LENGTHS if name != "fixed")
_NO_COMPILE = (OURS, BASELINE, EAGER)
# where a call takes seconds
_PEERS = (
    OURS, OWN_FROZEN, BASELINE, COMPILED, FREEZING, TORCH_ENCODER, ORT, OPENVINO, CTRANSLATE2,
)  # fmt: skip

# without a compilation for each length
_ANY_LENGTH = (OURS, OWN_FROZEN, BASELINE, ORT, OPENVINO, CTRANSLATE2)


def workloads(device: str, suite: str | None = None) -> list[Workload]:
    """The workloads of a device, of one suite or of all, in the order in which they run.

    Raises:
        ValueError: an unknown suite.
    """
    if suite is not None and suite not in SUITES:
        raise ValueError(f"suite: expected one of {', '.join(SUITES)}, got {suite!r}")
    found = [*_smoke(), *(_on_gpu() if device == "cuda" else _on_cpu())]
    found = [w for w in found if suite is None or suite in w.suites]
    return sorted(found, key=lambda w: w.priority)


def _smoke() -> list[Workload]:
    """One of everything, as small as it gets."""
    smoke = {"suites": ("smoke",), "priority": 9}
    ragged = {"B": 3, "S": 24, "H": 2, "D": 16, "lengths": "uniform"}
    return [
        inference("tiny", 1, 16, providers=_NO_COMPILE, **smoke),
        inference("tiny", 4, 16, **smoke),
        inference("tiny", 4, 16, lengths="uniform", providers=(*_NO_COMPILE, OWN_PADDED), **smoke),
        training_step("tiny", 2, 8, lengths="uniform", providers=_NO_COMPILE, **smoke),
        every_length("tiny", 16, providers=_NO_COMPILE, **smoke),
        encode_texts(16, suites=("smoke",)),
        kernel("attention", **ragged, **smoke),
        kernel("attention", direction="backward", **ragged, **smoke),
        kernel("attention, bias", B=2, S=16, H=2, D=16, bias=True, **smoke),
        kernel("attention, bias by place", direction="backward", bias=True, **ragged, **smoke),
        kernel("layer norm", M=32, N=64, residual=True, **smoke),
        kernel("layer norm", direction="backward", M=32, N=64, **smoke),
        kernel("softmax", M=32, N=32, **smoke),
        kernel("embedding", T=32, E=32, **smoke),
        kernel("linear + GELU", M=32, N=64, K=32, **smoke),
    ]


def _on_cpu() -> list[Workload]:
    found = []
    for model in ("minilm", "base"):
        # base takes seconds a call: later, so that a short run has the breadth of minilm first
        first = 1 if model == "minilm" else 2
        target = {"suites": ("targets", "models"), "priority": first}
        for batch, length in ((1, 32), (1, 128)):
            found.append(inference(model, batch, length, **target))
        if model == "minilm":
            late = {**target, "priority": 3}  # two minutes
            found.append(every_length(model, 256, providers=_ANY_LENGTH, **late))
            in_order = (OWN_FROZEN, BASELINE)
            found.append(every_length(model, 256, order="sorted", providers=in_order, **late))
            half = {**target, "dtype": torch.bfloat16, "providers": (OURS, OWN_FROZEN, BASELINE)}
            found += [inference(model, b, s, **half) for b, s in ((1, 32), (1, 128), (8, 128))]
        large = {**target, "providers": INFERENCE if model == "minilm" else _PEERS}
        found.append(inference(model, 8, 128, **large))
        found.append(inference(model, 32, 128, lengths="uniform", **large))
        breadth = {"suites": ("models",), "priority": first + 2, "providers": _NO_COMPILE}
        for length in (16, 64, 256, 512):
            found.append(inference(model, 1, length, **breadth))
        for lengths in ("squad", "short"):
            found.append(inference(model, 32, 128, lengths=lengths, **breadth))
    found.append(inference("minilm", 32, 128, suites=("models",), providers=_NO_COMPILE))
    found.append(inference("large", 1, 128, suites=("models",), providers=_NO_COMPILE, priority=6))
    found.append(
        training_step("minilm", 8, 128, lengths="uniform", suites=("targets", "models"), priority=2)
    )
    found.append(encode_texts(64, suites=("quick", "models")))
    quick = {"suites": ("quick",), "priority": 1, "providers": _NO_COMPILE}
    found += [
        inference("minilm", 1, 64, **quick),
        inference("minilm", 8, 64, **quick),
        *(inference("minilm", 16, 64, lengths=name, **quick) for name in _RAGGED),
        training_step("minilm", 4, 64, lengths="uniform", **quick),
    ]
    found += _kernels(
        torch.float32, tokens=1024, lengths=(32, 128, 512), head_dims=(32, 64), quick=True
    )
    return found


def _on_gpu() -> list[Workload]:
    half = torch.bfloat16
    target = {"dtype": half, "suites": ("targets", "models"), "priority": 1}
    found = [
        inference("base", 1, 128, **target),
        inference("base", 64, 512, lengths="uniform", **target),
        inference("base", 64, 512, **target),
        inference("large", 1, 128, **target),
        inference("large", 64, 384, lengths="squad", **target),
        training_step("base", 32, 512, **target),
        training_step("base", 32, 512, lengths="uniform", **target),
    ]
    kernel_target = {"dtype": half, "suites": ("targets", "kernels"), "priority": 0}
    sizes = {"H": 12, "D": 64}
    # torch.compile writes the scores out and takes a minute a shape to tune: in the breadth only
    attention = {**kernel_target, "providers": (OURS, TORCH_EAGER, *SDPA, VARLEN, FLASH_ATTN)}
    for length in (128, 256, 512, 1024, 2048):
        batch = 32768 // length
        found.append(kernel("attention", B=batch, S=length, **sizes, **attention))
        found.append(
            kernel("attention", direction="backward", B=batch, S=length, **sizes, **attention)
        )
    found.append(kernel("attention", B=64, S=512, **sizes, lengths="uniform", **attention))
    for width in (768, 1024):
        found.append(kernel("layer norm", M=32768, N=width, residual=True, **kernel_target))
        found.append(kernel("layer norm", direction="backward", M=32768, N=width, **kernel_target))
    found += [kernel("softmax", M=98304, N=n, **kernel_target) for n in (128, 512, 1024)]
    found.append(kernel("linear + GELU", M=32768, N=3072, K=768, **kernel_target))
    # no torch.compile in the breadth: with max-autotune every shape takes most of a minute
    breadth = {"dtype": half, "suites": ("models",), "priority": 6, "providers": _NO_COMPILE}
    for model in ("minilm", "base", "large"):
        found += [inference(model, 1, s, **breadth) for s in (16, 32, 64, 256, 512)]
        found += [inference(model, 64, 256, lengths=name, **breadth) for name in LENGTHS]
        found += [inference(model, b, 128, **breadth) for b in (8, 32, 256)]
    quick = {"dtype": half, "suites": ("quick",), "priority": 1, "providers": _NO_COMPILE}
    found += [inference("minilm", 1, 64, **quick), inference("base", 8, 64, **quick)]
    found += [inference("base", 32, 128, lengths=name, **quick) for name in _RAGGED]
    for dtype in (torch.bfloat16, torch.float16):
        found += _kernels(
            dtype,
            tokens=16384,
            lengths=(32, 64, 128, 256, 512, 1024, 4096, 8192),
            head_dims=(32, 64, 128),
            quick=dtype == torch.bfloat16,
        )
    return found


def _kernels(
    dtype: torch.dtype,
    *,
    tokens: int,
    lengths: tuple[int, ...],
    head_dims: tuple[int, ...],
    quick: bool,
) -> list[Workload]:
    """The breadth of single operations, about ``tokens`` tokens each."""
    common = {"dtype": dtype, "suites": ("kernels",), "priority": 7}
    found = []
    for head_dim in head_dims:
        for length in lengths:
            sizes = {"B": max(1, tokens // length), "S": length, "H": 12, "D": head_dim}
            found.append(kernel("attention", **sizes, **common))
            if length in (64, 128, 512):
                found.append(kernel("attention", direction="backward", **sizes, **common))
            if length in (128, 512):
                found.append(kernel("attention", **sizes, lengths="uniform", **common))
                found.append(kernel("attention, bias", **sizes, bias=True, **common))
                by_place = {**sizes, "lengths": "uniform", "bias": True, **common}
                found.append(kernel("attention, bias by place", **by_place))
                found.append(kernel("attention, bias by place", direction="backward", **by_place))
    for width in (384, 768, 1024):
        for residual in (False, True):
            found.append(kernel("layer norm", M=tokens, N=width, residual=residual, **common))
        found.append(kernel("layer norm", direction="backward", M=tokens, N=width, **common))
    found += [kernel("softmax", M=4 * tokens, N=n, **common) for n in (64, 128, 512)]
    for e in (384, 768):
        found.append(kernel("embedding", T=tokens, E=e, **common))
    found.append(kernel("linear + GELU", M=tokens, N=3072, K=768, **common))
    found.append(kernel("linear + GELU", direction="backward", M=tokens, N=3072, K=768, **common))
    if quick:
        few = {"dtype": dtype, "suites": ("quick",), "priority": 3}
        found += [
            kernel("attention", B=8, S=64, H=12, D=32, lengths="uniform", **few),
            kernel("layer norm", M=512, N=768, residual=True, **few),
            kernel("softmax", M=6144, N=64, **few),
            kernel("embedding", T=512, E=768, **few),
            kernel("linear + GELU", M=512, N=1536, K=384, **few),
        ]
    return found
