"""Which implementation of an op runs: the Triton kernels or plain torch.

Nobody has to choose: tensors on a CUDA device take the kernels, everything else takes torch, and
under Triton's interpreter (``TRITON_INTERPRET=1``) the kernels run anywhere. Where a dispatch mode
watches (a FLOP counter, one of the caller's own) torch's plain operations run, which it can read.
`backend` forces one
for a block of code, the environment variable ``FASTBERT_BACKEND`` for a process. A forced choice
that cannot be met is an error; there is no fallback.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = ["BACKENDS", "backend", "forced", "interpreting", "resolve", "unavailable", "watched"]

BACKENDS = ("torch", "triton")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MIN_CAPABILITY = (8, 0)  # below it there is no bf16 matrix unit and no asynchronous copy

# What was found out about this process; a dict, because torch.compile cannot see into lru_cache.
_known: dict[Any, Any] = {}


class _Choice(threading.local):
    name: str | None = None

    def __reduce__(self) -> str:
        return "_choice"  # picklers that follow a function's globals find the one of this module


_choice = _Choice()


def _check(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Force ``"triton"`` or ``"torch"`` for every op that this thread calls inside the block.

    ``None`` gives the choice back to the rule of this module. Blocks nest.

    Raises:
        ValueError: another name.
    """
    _check(name, "backend")
    previous = _choice.name
    _choice.name = name
    try:
        yield
    finally:
        _choice.name = previous


def _from_environment() -> str | None:
    """The one place that reads ``FASTBERT_BACKEND``."""
    if "FASTBERT_BACKEND" not in _known:
        name = os.environ.get("FASTBERT_BACKEND") or None
        _known["FASTBERT_BACKEND"] = _check(name, "FASTBERT_BACKEND")
    return _known["FASTBERT_BACKEND"]


def interpreting() -> bool:
    """Whether Triton interprets its kernels, so that they run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device_type: str, index: int | None = None) -> str | None:
    """Why the Triton kernels cannot run on this device, or None if they can."""
    key = (device_type, index)
    if key not in _known:
        _known[key] = _probe(device_type, index)
    return _known[key]


# torch.compiler.assume_constant_result, without importing the compiler: probing is not for it to
# trace, in a process whose first call is a compiled one, nor a reason to compile anew.
unavailable._dynamo_marked_constant = True
_from_environment._dynamo_marked_constant = True


def _probe(device_type: str, index: int | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreting():
        from ..kernels import _interpreter

        _interpreter.install()  # as it comes it computes nonsense in bf16
        return None
    if device_type != "cuda":
        return f"they run on CUDA devices, not on {device_type!r} (or under TRITON_INTERPRET=1)"
    if torch.version.cuda is None:
        return "they are tuned and tested for NVIDIA GPUs only"
    capability = torch.cuda.get_device_capability(index)
    if capability < _MIN_CAPABILITY:
        return f"they need compute capability 8.0 or newer, this GPU has {capability}"
    return None


def forced() -> str | None:
    """The backend that was asked for by name, or None when the choice is open."""
    return _choice.name or _from_environment()


def watched() -> bool:
    """Whether a dispatch mode is active that reads operations, and knows only torch's plain ones.

    torch's own other modes (fake tensors, tracing, activation checkpointing) take any operator.
    """
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return False
    modules = [type(mode).__module__ for mode in _get_current_dispatch_mode_stack()]
    return any(m == "torch.utils.flop_counter" or not m.startswith("torch.") for m in modules)


def resolve(device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The backend for ops on tensors of ``device``: ``"triton"`` or ``"torch"``.

    Args:
        dtype: of the tensors. The kernels compute fp32, fp16 and bf16; others take torch.

    Raises:
        RuntimeError: ``"triton"`` was asked for and cannot run there.
        NotImplementedError: ``"triton"`` was asked for, for a dtype that the kernels do not have.
    """
    chosen = forced()
    if chosen == "torch":
        return "torch"
    reason = unavailable(device.type, device.index)
    if reason is None:
        if dtype is None or dtype in _DTYPES:
            return "torch" if chosen is None and watched() else "triton"
        if chosen == "triton":
            raise NotImplementedError(
                f"backend: 'triton' was asked for, but the kernels compute fp32, fp16 and bf16, "
                f"not {dtype}. Leave the choice open or ask for 'torch'."
            )
        return "torch"
    if chosen == "triton":
        raise RuntimeError(
            f"backend: 'triton' was asked for, but the kernels cannot run here: {reason}. "
            "Leave the choice open or ask for 'torch'."
        )
    return "torch"
