"""Makes Triton's interpreter right for bf16 and fma: for tests and the workbench.

The interpreter keeps bf16 as uint16 and multiplies those bit patterns, truncates where a GPU
rounds to nearest even, and says nothing (triton issue 11584). Casts and ``tl.dot`` are mended
here. Arithmetic on bf16 without a cast to fp32 is made an error instead: our kernels compute in
fp32. ``tl.fma`` rounds twice there and once on a GPU; here once. In which order a product adds is
the hardware's business; numpy's adds small ones one after the other, which is three times less
exact than the library that results are compared with, and that library's own order depends on the
number of rows. Here sixteen terms are added at a time, which is as exact as that library at its
best, so that no result is held to luck of the shapes. A sum in fp16 is rounded to it every time.

How it becomes quick stands in `_interpreter_quick`.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from . import _interpreter_quick

_AT_ONCE = 16


def _to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even, as the hardware does."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _convert(src, dst_type, otherwise):
    source, target = src.dtype.scalar, dst_type.scalar
    if source == target or tl.bfloat16 not in (source, target):
        return otherwise()
    data = _to_fp32(src.data) if source == tl.bfloat16 else src.data
    if target == tl.bfloat16:
        return interpreter.TensorHandle(_to_bf16(data.astype(np.float32)), target)
    return interpreter.TensorHandle(data.astype(interpreter._get_np_dtype(target)), target)


def _in_torch(handle) -> torch.Tensor:
    """In fp32. A copy, since torch takes nothing that is turned around or cannot be written."""
    if handle.dtype.scalar == tl.bfloat16:
        return torch.from_numpy(_to_fp32(handle.data))
    return torch.from_numpy(np.array(handle.data)).float()


def _partial_products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What ``x @ y`` is the sum of, sixteen terms at a time, as matrix units take them."""
    if x.dim() != 2 or x.shape[1] % _AT_ONCE:
        return (x @ y)[None]
    return torch.bmm(x.unflatten(1, (-1, _AT_ONCE)).transpose(0, 1), y.unflatten(0, (-1, _AT_ONCE)))


def _mend_arithmetic() -> None:
    builder = interpreter.InterpreterBuilder
    cast_impl, fp_to_fp = builder.cast_impl, builder.create_fp_to_fp
    binary_op, unary_op, dot = builder.binary_op, builder.unary_op, builder.create_dot

    def refuse(*handles):
        for handle in handles:
            if handle.dtype.scalar == tl.bfloat16:
                raise TypeError("arithmetic on bf16: cast to tl.float32 first")

    def new_binary_op(self, lhs, rhs, op):
        refuse(lhs, rhs)
        return binary_op(self, lhs, rhs, op)

    def new_unary_op(self, arg, op):
        refuse(arg)
        return unary_op(self, arg, op)

    def new_dot(self, a, b, d, *args):
        total = d.dtype.scalar
        if total not in (tl.float32, tl.float16):
            refuse(a, b)
            return dot(self, a, b, d, *args)
        with torch.autocast("cpu", enabled=False):
            parts = _partial_products(_in_torch(a), _in_torch(b))
        if total == tl.float32:
            return interpreter.TensorHandle(parts.sum(0).numpy() + d.data, total)
        result = d.data
        for part in parts.numpy():
            result = (part + result).astype(np.float16)
        return interpreter.TensorHandle(result, total)

    def new_cast_impl(self, src, dst):
        return _convert(src, dst, lambda: cast_impl(self, src, dst))

    builder.cast_impl = new_cast_impl
    builder.create_fp_to_fp = lambda self, src, dst, mode: _convert(
        src, dst, lambda: fp_to_fp(self, src, dst, mode)
    )
    builder.binary_op, builder.unary_op, builder.create_dot = new_binary_op, new_unary_op, new_dot

    def fma(self, x, y, z):
        # The product of two fp32 values is exact in fp64.
        refuse(x, y, z)
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    builder.create_fma = fma
    builder.create_erf = lambda self, arg: interpreter.TensorHandle(
        torch.erf(torch.from_numpy(np.ascontiguousarray(arg.data))).numpy(), arg.dtype.scalar
    )


def _mend_indices() -> None:
    """Of loop bounds that are values: triton 3.6 converts arrays, which newer numpy refuses."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


_installed = False


def install(*, strict: bool = False) -> None:
    """Mend the interpreter of this process; once is enough.

    Args:
        strict: whether int32 that overflows is an error, as in tests; somebody else's kernel may
            count on it.
    """
    global _installed
    if strict:
        _interpreter_quick.refuse_overflow()
    if _installed:
        return
    _installed = True
    _mend_arithmetic()
    _mend_indices()
    _interpreter_quick.install()
