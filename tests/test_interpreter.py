"""Triton's interpreter, made quick, promotes, broadcasts and refuses as Triton does.

That its results are right is what every test of a kernel says.
"""

import functools
import itertools

import numpy as np
import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("kernels run on the GPU", allow_module_level=True)

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from fastbert.kernels._interpreter_operators import OPERATIONS  # noqa: E402
from triton.language.semantic import TritonSemantic  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

QUICK = interpreter.interpreter_semantic
TRITONS = TritonSemantic(interpreter.interpreter_builder)

DTYPES = (tl.int1, tl.int8, tl.int32, tl.uint32, tl.int64, tl.float16, tl.bfloat16, tl.float32,
          tl.float64, tl.pointer_type(tl.float32))  # fmt: skip
SHAPES = ((), (1,), (4,), (1, 4), (4, 1), (2, 4), (2, 8))
FILLS = (0, 0.0, -0.0, 1, 0.5, -1, float("-inf"))
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
    return outcome_of(getattr(semantic, method), *args)


def outcome_of(function, *args):
    """Types, shapes, values and dtypes in numpy of what comes back, or the error."""
    with np.errstate(all="ignore"):
        try:
            result = function(*args)
        except Exception as error:
            return type(error), str(error)
    return [
        (str(t.type), str(t.dtype), [s.value for s in t.shape], t.numel.value,
         str(t.handle.dtype), t.handle.data.dtype, t.handle.data.shape, t.handle.data.tobytes())
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


# As Triton has them: nothing is launched while this file is imported.
TRITONS_OWN = {key: getattr(*key) for key in OPERATIONS}
BINARY = [name for owner, name in OPERATIONS if owner is tl.tensor and name not in (
    "__getitem__", "to")]  # fmt: skip
SPECIAL = {"fp32": [np.nan, np.inf, -np.inf, -0.0, 1e-45, 3e38, -1.5, 65519.0],
           "fp16": [np.nan, np.inf, -0.0, 6e-8, 65504.0, -2.0, 1.0, 3.0],
           "int1": [0, 1, 1, 0, 0, 0, 1, 1],
           "uint32": [0, 1, 2**31, 2**32 - 1, 5, 2**31 - 1, 7, 31],
           "int32": [0, 1, -1, 2**31 - 1, -(2**31), 77, -13, 31],
           "int64": [0, 1, -1, 2**63 - 1, -(2**63), 2**40, -13, 31]}  # fmt: skip


def special(dtype, shape):
    """Values at the ends of a type, in another order for another shape."""
    values = SPECIAL.get(dtype.name)
    if values is None:
        return tensor(dtype, shape)
    count, start = int(np.prod(shape, dtype=int)), len(shape)
    data = np.array([values[(start + i) % 8] for i in range(count)])
    data = data.astype(interpreter._get_np_dtype(dtype)).reshape(shape or 1)
    return tl.tensor(
        interpreter.TensorHandle(data, dtype), tl.block_type(dtype, list(shape)) if shape else dtype
    )


def both_ways(owner, name):
    """The operation that goes to numpy where it can, Triton's own, and how often it was asked."""
    asked = []
    tritons = functools.partial(TRITONS_OWN[owner, name], _semantic=QUICK)

    def ask(*args, **kwargs):
        asked.append(args)
        return tritons(*args, **kwargs)

    return OPERATIONS[owner, name](ask), tritons, asked


@pytest.mark.filterwarnings("ignore:Value .* exceeds the maximum bitwidth")
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("__add__", "__lt__"))) for n in BINARY],
)
def test_an_operation_that_goes_to_numpy_is_tritons(name):
    direct, tritons, asked = both_ways(tl.tensor, name)
    cases = 0
    for left, shape in itertools.product(DTYPES, SHAPES):
        others = [*NUMBERS, float("-inf"), float("nan"), 31, 32, tl.constexpr(3), tl.constexpr(0.5)]
        others += [special(left, other) for other in SHAPES]
        others += [special(right, other) for right in DTYPES for other in ((), (4,))]
        for other in others:
            cases += 1
            args = special(left, shape), other
            assert outcome_of(direct, *args) == outcome_of(tritons, *args), (left, shape, other)
    assert len(asked) < cases - 50


def test_blocks_of_one_type_go_to_numpy():
    for name in BINARY:
        dtype = tl.uint32 if name in ("__and__", "__or__", "__xor__", "__rshift__") else tl.float32
        direct, _, asked = both_ways(tl.tensor, name)
        block = tensor(dtype, (2, 4))
        for other in (block, tensor(dtype, (2, 1)), tensor(dtype, ()), 3):
            direct(block, other)
        assert not asked, name


def test_casts_and_indices_that_go_to_numpy_are_tritons():
    direct, tritons, asked = both_ways(tl.tensor, "to")
    for dtype, target, shape in itertools.product(DTYPES[:-1], DTYPES[:-1], SHAPES):
        args = special(dtype, shape), target
        assert outcome_of(direct, *args) == outcome_of(tritons, *args), (dtype, target, shape)
    assert 0 < len(asked) < len(DTYPES[:-1]) ** 2 * len(SHAPES)
    direct, tritons, asked = both_ways(tl.tensor, "__getitem__")
    new, whole = None, slice(None)
    indices = [(new, whole), (whole, new), (new, whole, new), (whole, whole, new), (new,), new,
               (slice(0, 1), new), (whole,), (0, whole)]  # fmt: skip
    for dtype, shape, index in itertools.product(DTYPES, SHAPES, indices):
        args = special(dtype, shape), index
        assert outcome_of(direct, *args) == outcome_of(tritons, *args), (dtype, shape, index)


def test_selections_that_go_to_numpy_are_tritons():
    direct, tritons, asked = both_ways(tl, "where")
    cases = 0
    plain = (tl.int32, tl.float32, tl.bfloat16, tl.int64)
    shapes = ((), (4,), (1, 4), (2, 1), (2, 4))
    for shown, left, dtype in itertools.product(shapes, shapes, plain):
        x = special(dtype, left)
        for y in (0, 0.5, float("-inf"), *(special(d, r) for d in plain for r in shapes)):
            for args in ((x, y), (y, x)):
                cases += 1
                args = special(tl.int1, shown), *args
                assert outcome_of(direct, *args) == outcome_of(tritons, *args), args
    assert len(asked) < cases - 50


def test_products_that_go_to_numpy_are_tritons():
    direct, tritons, asked = both_ways(tl, "trans")
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        for axes in ((), (1, 0), ((1, 0),), (0, 1)):
            args = special(dtype, shape), *axes
            assert outcome_of(direct, *args) == outcome_of(tritons, *args), args
    assert len(asked) < len(DTYPES) * len(SHAPES) * 4

    direct, tritons, asked = both_ways(tl, "dot")
    shapes = ((2, 4), (4, 2), (4, 8), (4,), (1, 2, 4), (1, 4, 2))
    starts = (None, tensor(tl.float32, (2, 2)), tensor(tl.float32, (4, 4)),
              tensor(tl.float16, (2, 2)), tensor(tl.int32, (2, 2)))  # fmt: skip
    choices = ({}, {"input_precision": "tf32"}, {"input_precision": "ieee"},
               {"input_precision": "none"}, {"out_dtype": tl.float16})  # fmt: skip
    factors = [tensor(dtype, shape) for dtype in DTYPES for shape in shapes]
    cases = 0
    for left, right in itertools.product(factors, repeat=2):
        alike = left.dtype == right.dtype
        for acc, options in itertools.product(starts, choices if alike else choices[:1]):
            cases += 1
            args = left, right, acc
            expected = outcome_of(functools.partial(tritons, **options), *args)
            assert outcome_of(functools.partial(direct, **options), *args) == expected, args
    assert len(asked) < cases


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [tl.float32, tl.float16, tl.bfloat16], ids=str)
def test_products_take_blocks_that_numpy_cannot_write_or_has_turned_around(dtype):
    direct, _, _ = both_ways(tl, "dot")
    block, row = tensor(dtype, (16, 32)), tensor(dtype, (1, 32))
    spread = interpreter.TensorHandle(np.broadcast_to(row.handle.data, (16, 32)), dtype)
    turned = interpreter.TensorHandle(block.handle.data[::-1], dtype)
    weight = tensor(dtype, (32, 16))
    for handle in (spread, turned):
        copied = interpreter.TensorHandle(handle.data.copy(), dtype)
        found, expected = (direct(tl.tensor(h, block.type), weight) for h in (handle, copied))
        assert (found.handle.data == expected.handle.data).all()


def test_a_sum_in_fp16_is_rounded_after_every_sixteen_terms():
    direct, _, _ = both_ways(tl, "dot")
    generator, blocks = np.random.default_rng(0), []
    for shape in ((16, 64), (64, 16), (16, 16)):
        values = generator.standard_normal(shape).astype(np.float16)
        handle = interpreter.TensorHandle(values, tl.float16)
        blocks.append(tl.tensor(handle, tl.block_type(tl.float16, list(shape))))
    found = direct(*blocks, out_dtype=tl.float16).handle.data
    x, y, total = (block.handle.data.astype(np.float64) for block in blocks)
    once = (x @ y + total).astype(np.float16)
    for k in range(0, 64, 16):
        total = (total + x[:, k : k + 16] @ y[k : k + 16]).astype(np.float16)
    assert (found == total).mean() > 0.99 > 0.8 > (found == once).mean()


def test_a_launch_leaves_the_language_and_numpy_as_they_were():
    scope = interpreter._patch_lang(None)  # the fixture's
    assert tl.load is not TRITONS_OWN[tl, "load"] and np.geterr()["over"] == "ignore"
    scope.restore()
    assert all(getattr(*key) is original for key, original in TRITONS_OWN.items())
    assert np.geterr()["over"] == "warn"


@pytest.mark.parametrize("dtype", [d for d in DTYPES if not d.is_ptr()], ids=str)
def test_memory_that_goes_to_numpy_is_read_and_written_as_triton_does(dtype):
    read, tritons_read, asked = both_ways(tl, "load")
    write, tritons_write, _ = both_ways(tl, "store")
    pointers = tl.pointer_type(dtype)
    size = max(1, dtype.primitive_bitwidth // 8)
    memory = np.arange(8 * size, dtype=np.uint8) % (2 if dtype == tl.int1 else 251)
    cases = 0
    for shape, masks in itertools.product(((), (4,), (2, 4)), ((), (4,), (2, 1), (2, 4))):
        offsets = size * np.arange(int(np.prod(shape, dtype=int)), dtype=np.uint64)
        addresses = (memory.ctypes.data + offsets).reshape(shape or 1)
        handle = interpreter.TensorHandle(addresses, pointers)
        pointer = tl.tensor(handle, tl.block_type(pointers, list(shape)) if shape else pointers)
        for mask in (None, special(tl.int1, masks)):
            for other in (None, *FILLS, special(tl.float32, shape)):
                cases += 1
                args = pointer, mask, other
                assert outcome_of(read, *args) == outcome_of(tritons_read, *args), args
            for value in (3, *(special(d, s) for d in DTYPES for s in ((), shape, masks))):
                found = []
                for store in (write, tritons_write):
                    before = memory.copy()
                    try:
                        with np.errstate(all="ignore"):
                            store(pointer, value, mask)
                        found.append(memory.tobytes())
                    except Exception as error:
                        found.append((type(error), str(error)))
                    memory[:] = before
                assert found[0] == found[1], (pointer, value, mask)
    assert (len(asked) == cases) == (dtype.name in ("int1", "uint32", "fp64"))
