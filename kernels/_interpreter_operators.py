"""Operations of tensors that go from Triton's interpreter straight to numpy.

A kernel is mostly sums, products, comparisons, casts, loads and stores of blocks of one type, and
numpy broadcasts them by the rules that Triton has. Each function here takes the operation as Triton
has it and returns one that does the plain cases itself and asks Triton's for all others: types to
promote, shapes of different rank, numbers that have another type, bf16 and fp8, and every error.
What comes back is what Triton's returns, to the bit, the type and numpy's dtype; `test_interpreter`
compares them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter

__all__ = ["OPERATIONS", "in_int32", "is_negative_zero"]

_NUMBERS = {"fp32": np.float32, "int32": np.int32, "int64": np.int64, "uint32": np.uint32}
_BITS = {"int32": 32, "int64": 64, "uint32": 32}
# From where to below where a number of Python's takes the type of the tensor that it meets.
_RANGES = {"int32": (-(2**31), 2**31), "int64": (-(2**31), 2**31), "uint32": (0, 2**32),
           "fp32": (-(2**31), 2**31)}  # fmt: skip
_BITWISE = frozenset({*_BITS, "int1"})
_FP32 = np.finfo(np.float32)
_OFFSETS = ("int32", "int64")
_IN_MEMORY = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16, "int32": np.int32,
              "int64": np.int64, "uint8": np.uint8, "int8": np.int8}  # fmt: skip
_FACTORS = ("fp32", "fp16", "bf16")
_POLICIES = ("", "evict_first", "evict_last")
# Casts that are one of numpy's.
_CASTS = {"int1": _NUMBERS, "int32": _NUMBERS, "int64": _NUMBERS, "uint32": _NUMBERS,
          "fp16": ("fp32",)}  # fmt: skip


def in_int32(compute: np.ufunc, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Sum, difference or product of int32, which has to be int32 as well."""
    exact = compute(left, right, dtype=np.int64)
    smallest, largest = np.minimum.reduce(exact, axis=None), np.maximum.reduce(exact, axis=None)
    if smallest < -(2**31) or largest >= 2**31:
        raise OverflowError(f"int32 overflow in {compute.__name__}: cast to tl.int64")
    return exact.astype(np.int32)


def _tensor(data: np.ndarray, dtype, is_block: bool, of=None) -> core.tensor:
    """``of``: the type that Triton notes beside the data, where it is another."""
    handle = interpreter.TensorHandle(data, of or dtype)
    if not is_block:
        return core.tensor(handle, dtype)
    try:
        return core.tensor(handle, dtype.blocks[data.shape])  # as `_make_types_once` keeps them
    except (AttributeError, KeyError):
        return core.tensor(handle, core.block_type(dtype, list(data.shape)))


def _is_number(value, name: str) -> bool:
    """Whether this number becomes a tensor of that type, in every operation."""
    kind = type(value)
    if kind is int:
        low, high = _RANGES[name]
        return low <= value < high
    if kind is not float or name != "fp32":
        return False
    size = abs(value)
    if size == 0:
        return not is_negative_zero(value)
    return size == float("inf") or _FP32.tiny <= size <= _FP32.max or size != size


def is_negative_zero(value: float) -> bool:
    """Whether a number is one that loses its sign in some versions of Triton."""
    return value == 0 and math.copysign(1, value) < 0


class _Met(NamedTuple):
    """What a tensor meets in an operation: for numpy, and of what the operation is."""

    data: np.ndarray | np.generic
    dtype: core.dtype
    is_block: bool


def _meet(tensor: core.tensor, other, names) -> _Met | None:
    """None where Triton is to decide: types are not among these, or shapes do not go together."""
    dtype = tensor.dtype
    if dtype.name not in names:
        return None
    if type(other) is core.constexpr:
        other = other.value
    left = tensor.type
    if type(other) is not core.tensor:
        if dtype.name not in _NUMBERS or not _is_number(other, dtype.name):
            return None
        return _Met(_NUMBERS[dtype.name](other), dtype, left.is_block())
    right = other.type
    if left is right:
        return _Met(other.handle.data, dtype, left.is_block())
    if other.dtype.name != dtype.name:
        if {other.dtype.name, dtype.name} != {"int32", "int64"}:
            return None
        dtype = tl.int64
    blocks = left.is_block(), right.is_block()
    if all(blocks) and not _broadcast(tensor.handle.data.shape, other.handle.data.shape):
        return None
    return _Met(other.handle.data, dtype, any(blocks))


def _broadcast(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    return len(left) == len(right) and all(
        m == n or m == 1 or n == 1 for m, n in zip(left, right, strict=True)
    )


def _binary(compute: np.ufunc, names=_NUMBERS, *, reflected=False, compares=False) -> Callable:
    may_overflow = compute in (np.add, np.subtract, np.multiply)

    def made(tritons: Callable) -> Callable:
        def operation(self, other):
            met = _meet(self, other, names)
            if met is None:
                return tritons(self, other)
            left, right = self.handle.data, met.data
            if reflected:
                left, right = right, left
            exactly = may_overflow and met.dtype.name == "int32"
            if exactly and interpreter.interpreter_semantic.refuses_overflow:
                return _tensor(in_int32(compute, left, right), met.dtype, met.is_block)
            if compares:
                return _tensor(compute(left, right), tl.int1, met.is_block, met.dtype)
            return _tensor(compute(left, right), met.dtype, met.is_block)

        return operation

    return made


def _sum(tritons: Callable) -> Callable:
    of_numbers = _binary(np.add)(tritons)

    def add(self, other):
        if not self.dtype.is_ptr():
            return of_numbers(self, other)
        pointers, size = self.type, max(1, self.dtype.element_ty.primitive_bitwidth // 8)
        if type(other) is int and _is_number(other, "int32"):
            offsets, is_block = np.int64(other), pointers.is_block()
        elif type(other) is core.tensor and other.dtype.name in _OFFSETS:
            blocks = pointers.is_block(), other.type.is_block()
            offsets, is_block = other.handle.data, any(blocks)
            if all(blocks) and not _broadcast(self.handle.data.shape, offsets.shape):
                return tritons(self, other)
        else:
            return tritons(self, other)
        addresses = self.handle.data + np.uint64(size) * offsets.astype(np.uint64)
        return _tensor(addresses, self.dtype, is_block, self.handle.dtype)

    return add


def _shift_right(tritons: Callable) -> Callable:
    def operation(self, other):
        met = _meet(self, other, _BITS)
        bits = other.value if type(other) is core.constexpr else other
        if met is None or (type(bits) is int and not 0 <= bits < _BITS[self.dtype.name]):
            return tritons(self, other)
        return _tensor(np.right_shift(self.handle.data, met.data), met.dtype, met.is_block)

    return operation


def _indexed(tritons: Callable) -> Callable:
    def operation(self, index):
        whole = type(index) is tuple and self.type.is_block()
        if not whole or any(i is not None and i != slice(None) for i in index):
            return tritons(self, index)
        if sum(i is not None for i in index) != self.handle.data.ndim:
            return tritons(self, index)
        return _tensor(self.handle.data[index], self.dtype, True, self.handle.dtype.scalar)

    return operation


def _cast(tritons: Callable) -> Callable:
    def operation(self, dtype, *args, **kwargs):
        if type(dtype) is core.constexpr:
            dtype = dtype.value
        if args or kwargs or type(dtype) is not core.dtype:
            return tritons(self, dtype, *args, **kwargs)
        if self.dtype.name == dtype.name:
            return self
        if dtype.name not in _CASTS.get(self.dtype.name, ()):
            return tritons(self, dtype)
        return _tensor(self.handle.data.astype(_NUMBERS[dtype.name]), dtype, self.type.is_block())

    return operation


def _mask(mask, pointer) -> np.ndarray | None:
    """The mask in the shape of the pointers; None where Triton is to decide."""
    shape = pointer.handle.data.shape
    if mask is None:
        return np.ones(shape, bool)
    if type(mask) is not core.tensor or mask.dtype.name != "int1":
        return None
    return _in_shape(mask, shape) if pointer.type.is_block() or not mask.type.is_block() else None


def _in_shape(tensor: core.tensor, shape: tuple[int, ...]) -> np.ndarray | None:
    data = tensor.handle.data
    if data.shape == shape:
        return data
    if tensor.type.is_block() and (
        data.ndim != len(shape)
        or any(m not in (1, n) for m, n in zip(data.shape, shape, strict=True))
    ):
        return None
    return np.broadcast_to(data, shape)


def _in_memory(pointer, hints: dict) -> str | None:
    """The name of the type that the pointer points to; None where Triton is to decide."""
    if type(pointer) is not core.tensor or not pointer.dtype.is_ptr():
        return None
    if hints and (list(hints) != ["eviction_policy"] or hints["eviction_policy"] not in _POLICIES):
        return None
    element = pointer.dtype.element_ty
    return element.name if type(element) is core.dtype and element.name in _IN_MEMORY else None


def _load(tritons: Callable) -> Callable:
    def operation(pointer, mask=None, other=None, **hints):
        name = _in_memory(pointer, hints)
        filled = mask is not None and type(other) in (int, float) and not is_negative_zero(other)
        if name is None or not (
            other is None
            or (filled and (other == 0 or (name in _NUMBERS and _is_number(other, name))))
        ):
            return tritons(pointer, mask, other, **hints)
        shown = _mask(mask, pointer)
        if shown is None:
            return tritons(pointer, mask, other, **hints)
        addresses, dtype = pointer.handle.data, _IN_MEMORY[name]
        instead = np.full(addresses.shape, other or 0, dtype)
        data = interpreter._interpreter.load(addresses, shown, instead, np.dtype(dtype))
        return _tensor(data, pointer.dtype.element_ty, pointer.type.is_block())

    return operation


def _store(tritons: Callable) -> Callable:
    def operation(pointer, value, mask=None, **hints):
        name = _in_memory(pointer, hints)
        ours = name is not None and type(value) is core.tensor and value.dtype.name == name
        if not ours or (value.type.is_block() and not pointer.type.is_block()):
            return tritons(pointer, value, mask, **hints)
        addresses = pointer.handle.data
        shown, values = _mask(mask, pointer), _in_shape(value, addresses.shape)
        if shown is None or values is None:
            return tritons(pointer, value, mask, **hints)
        return interpreter._interpreter.store(addresses, values, shown)

    return operation


def _select(tritons: Callable) -> Callable:
    def operation(condition, x, y):
        first, second = (x, y) if type(x) is core.tensor else (y, x)
        if type(condition) is not core.tensor or type(first) is not core.tensor:
            return tritons(condition, x, y)
        shape = first.handle.data.shape
        met = _meet(first, second, _NUMBERS) if first.type.is_block() else None
        if met is None or met.data.shape not in ((), shape) or condition.dtype.name != "int1":
            return tritons(condition, x, y)
        shown = _in_shape(condition, shape)
        if shown is None:
            return tritons(condition, x, y)
        values = (first.handle.data, met.data) if first is x else (met.data, first.handle.data)
        return _tensor(np.where(shown, *values), met.dtype, True)

    return operation


def _transposed(tritons: Callable) -> Callable:
    def operation(block, *axes):
        if axes or type(block) is not core.tensor or block.handle.data.ndim != 2:
            return tritons(block, *axes)
        return _tensor(block.handle.data.T, block.dtype, True, block.handle.dtype.scalar)

    return operation


def _product(tritons: Callable) -> Callable:
    def operation(left, right, acc=None, **options):
        a, b = left.handle.data.shape, right.handle.data.shape
        plain = list(options) in ([], ["input_precision"]) and len(a) == len(b) == 2
        dtype = left.dtype.name
        if not plain or a[1] != b[0] or dtype != right.dtype.name or dtype not in _FACTORS:
            return tritons(left, right, acc, **options)
        if options.get("input_precision") not in (None, "ieee", "tf32"):
            return tritons(left, right, acc, **options)
        shape = (a[0], b[1])
        if acc is None:
            start = interpreter.TensorHandle(np.zeros(shape, np.float32), tl.float32)
        elif acc.dtype.name == "fp32" and acc.handle.data.shape == shape:
            start = acc.handle
        else:
            return tritons(left, right, acc, **options)
        builder = interpreter.interpreter_builder
        handle = builder.create_dot(left.handle, right.handle, start, None, 0)
        return core.tensor(handle, core.block_type(tl.float32, list(shape)))

    return operation


# By Triton's module or class and the name there, what makes the direct operation of Triton's own.
OPERATIONS: dict[tuple[object, str], Callable] = {
    **{
        (core.tensor, name): make
        for name, make in {
            "__add__": _sum,
            "__radd__": _binary(np.add, reflected=True),
            "__sub__": _binary(np.subtract),
            "__rsub__": _binary(np.subtract, reflected=True),
            "__mul__": _binary(np.multiply),
            "__rmul__": _binary(np.multiply, reflected=True),
            "__truediv__": _binary(np.divide, ("fp32",)),
            "__rtruediv__": _binary(np.divide, ("fp32",), reflected=True),
            "__lt__": _binary(np.less, compares=True),
            "__le__": _binary(np.less_equal, compares=True),
            "__gt__": _binary(np.greater, compares=True),
            "__ge__": _binary(np.greater_equal, compares=True),
            "__eq__": _binary(np.equal, compares=True),
            "__ne__": _binary(np.not_equal, compares=True),
            "__and__": _binary(np.bitwise_and, _BITWISE),
            "__or__": _binary(np.bitwise_or, _BITWISE),
            "__xor__": _binary(np.bitwise_xor, _BITWISE),
            "__rshift__": _shift_right,
            "__getitem__": _indexed,
            "to": _cast,
        }.items()
    },
    (tl, "load"): _load,
    (tl, "store"): _store,
    (tl, "where"): _select,
    (tl, "trans"): _transposed,
    (tl, "dot"): _product,
}
