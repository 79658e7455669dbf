"""Registration of the kernels with torch, so that ``torch.compile`` and ``torch.export`` see
opaque ops.

Each op is a schema, a launch function and a function that computes shapes. define/impl is used
instead of ``torch.library.custom_op`` because it costs a quarter of the time per call; gradients
are attached outside (`fastbert.ops.gradient`), so that an op has one boundary and not two.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["define"]

_LIBRARY = torch.library.Library("fastbert", "FRAGMENT")


def define(schema: str, launch: Callable, fake: Callable) -> Callable:
    """Register ``fastbert::<schema>`` and return the op.

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
    return getattr(torch.ops.fastbert, name)
