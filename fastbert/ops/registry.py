"""Registration of the kernels with torch, so that ``torch.compile`` and ``torch.export`` see
opaque ops.

Each op is a schema, a launch function and a function that computes shapes. define/impl is used
instead of ``torch.library.custom_op`` because it costs a quarter of the time per call; gradients
are attached outside (`fastbert.ops.gradient`), so that an op has one boundary and not two.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["define", "takes_launches"]

_LIBRARY = torch.library.Library("fastbert", "FRAGMENT")
# Arguments that nobody has to be asked about: no fake, distributed or otherwise wrapped tensor.
_ORDINARY = frozenset((Tensor, nn.Parameter, type(None), int, float, bool, str, tuple, torch.dtype))


def define(schema: str, launch: Callable, fake: Callable) -> Callable:
    """Register ``fastbert::<schema>`` and return a function that calls it.

    Where nobody could see the difference, the function launches the kernel without the op around
    it, which takes torch's dispatcher longer than the launch.

    Args:
        schema: name, arguments and results, in torch's schema language.
        launch: runs the kernel; imports it, since ops must be importable without Triton.
        fake: allocates results of the right shape, dtype and strides without computing.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for key in ("CUDA", "CPU"):  # on the CPU only Triton's interpreter gets here
        _LIBRARY.impl(name, launch, key)
    torch.library.register_fake(f"fastbert::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.fastbert, name)

    def call(*args):
        return launch(*args) if takes_launches(args) else op(*args)

    return call


def takes_launches(args: tuple) -> bool:
    """Whether a kernel may be launched on these arguments without torch's dispatcher: no compiler,
    tracer, transform or mode wants to see an op, and they are ordinary."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and _ORDINARY.issuperset(map(type, args))
    )
