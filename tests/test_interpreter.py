"""Triton's interpreter, made quick, promotes, broadcasts and refuses as Triton does.

That its results are right is what every test of a kernel says.
"""

import itertools

import numpy as np
import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("kernels run on the GPU", allow_module_level=True)

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.language.semantic import TritonSemantic  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

QUICK = interpreter.interpreter_semantic
TRITONS = TritonSemantic(interpreter.interpreter_builder)

DTYPES = (tl.int1, tl.int8, tl.int32, tl.uint32, tl.int64, tl.float16, tl.bfloat16, tl.float32,
          tl.float64, tl.pointer_type(tl.float32))  # fmt: skip
SHAPES = ((), (1,), (4,), (1, 4), (4, 1), (2, 4), (2, 8))
NUMBERS = (0, 1, -1, True, 2**31 - 1, 2**31, -(2**31) - 1, 2**40, 2**63, 2**70, 0.5, -0.0, 1e-42,
           1e300, float("inf"))  # fmt: skip


@pytest.fixture(autouse=True)
def as_in_a_launch():
    scope = interpreter._patch_lang(as_in_a_launch.__wrapped__)
    yield
    scope.restore()


def tensor(dtype, shape):
    values = np.arange(2, 2 + np.prod(shape, dtype=int)).reshape(shape or 1)
    handle = interpreter.TensorHandle(values.astype(interpreter._get_np_dtype(dtype)), dtype)
    return tl.tensor(handle, tl.block_type(dtype, list(shape)) if shape else dtype)


def outcome(semantic, method, *args):
    """Types, shapes, values and dtypes in numpy of what comes back, or the error."""
    with np.errstate(all="ignore"):
        try:
            result = getattr(semantic, method)(*args)
        except Exception as error:
            return type(error), str(error)
    return [
        (str(t.type), str(t.dtype), [s.value for s in t.shape], t.numel.value,
         str(t.handle.dtype), t.handle.data.dtype, t.handle.data.shape, t.handle.data.tolist())
        for t in (result if isinstance(result, tuple) else (result,))
    ]  # fmt: skip


def assert_same(method, *args):
    assert outcome(QUICK, method, *args) == outcome(TRITONS, method, *args), (method, args)


@pytest.mark.parametrize("div_or_mod", [False, True], ids=["", "division"])
@pytest.mark.parametrize("pointers", [False, True], ids=["", "pointers"])
def test_types_are_promoted_as_triton_does(pointers, div_or_mod):
    flags = pointers, pointers, True, div_or_mod
    for left, right in itertools.product(DTYPES, repeat=2):
        for shapes in (((4,), (4,)), ((4, 1), (1, 4)), ((), (2, 4)), ((4,), ())):
            args = tensor(left, shapes[0]), tensor(right, shapes[1])
            assert_same("binary_op_type_checking_impl", *args, *flags)


def test_numbers_take_the_type_that_triton_gives_them():
    for dtype, number, shape in itertools.product(DTYPES, NUMBERS, ((), (2, 4))):
        for div_or_mod in (False, True):
            flags = True, True, True, div_or_mod
            args = tensor(dtype, shape), number
            assert_same("binary_op_type_checking_impl", *args, *flags)
            assert_same("binary_op_type_checking_impl", *args[::-1], *flags)


def test_shapes_are_broadcast_as_triton_does():
    for left, right in itertools.product(SHAPES, repeat=2):
        assert_same("broadcast_impl_value", tensor(tl.float32, left), tensor(tl.int32, right))


@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
def test_integers_that_overflow_are_an_error(operation):
    for value, other in itertools.product((2**31 - 1, -(2**31), 3, 2**16), (1, -1, 2, 2**15)):
        handle = interpreter.TensorHandle(np.array([3, value], np.int32), tl.int32)
        args = tl.tensor(handle, tl.block_type(tl.int32, [2])), other, True
        exact = {"add": value + other, "sub": value - other, "mul": value * other}[operation]
        found = outcome(QUICK, operation, *args)
        if -(2**31) <= exact < 2**31:
            assert found == outcome(TRITONS, operation, *args)
        else:
            assert found[0] is OverflowError


def test_overflow_is_an_error_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(type(QUICK), "refuses_overflow", False)
    args = tensor(tl.int32, (4,)), 2**31 - 1, True
    with np.errstate(over="ignore"):
        assert outcome(QUICK, "add", *args) == outcome(TRITONS, "add", *args)


def test_a_type_is_one_object():
    assert tl.block_type(tl.float32, [2, 4]) is tl.block_type(tl.float32, [2, 4])
    assert tl.block_type(tl.float32, [2, 4]) == tl.block_type(tl.float32, [tl.constexpr(2), 4])
    assert tl.block_type(tl.float32, [2, 4]) != tl.block_type(tl.int32, [2, 4])
    with pytest.raises(ValueError, match="power of 2"):
        tl.block_type(tl.float32, [3])
    with pytest.raises(TypeError):
        tl.block_type(tl.float32, [])
