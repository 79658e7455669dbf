"""What is launched again for another layer computes what calling its function again would.

The kernels are stand-ins that torch computes when they are launched, as the interpreter does.
"""

import threading

import pytest
import torch

pytest.importorskip("fastbert.kernels._launch", exc_type=ImportError)

from fastbert.kernels._launch import launch

from fastbert.ops.repeated import Repeated, Repeats, once


class Sum:
    """``out = x + y * factor`` of flat tensors."""

    def __getitem__(self, grid):
        def run(out, x, y, factor, *, num_warps):
            out.copy_(x + y * factor)

        return run


KERNEL = Sum()


class Counted:
    """A function of tensors, which counts its own calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


def add(x, y, factor=2.0):
    out = torch.empty_like(x)
    launch(KERNEL, (1,), out, x, y, factor, num_warps=1)
    return out


def drawn(count=2, size=8):
    return [torch.randn(size) for _ in range(count)]


def agrees(function, *calls, fresh=True) -> int:
    """Compare with the function itself; how often that was called for it."""
    counted = Counted(function)
    repeated = Repeated(counted, fresh)
    found = [repeated(*args) for args in calls]
    for one, args in zip(found, calls, strict=True):
        expected = function(*args)
        if isinstance(one, torch.Tensor):
            one, expected = (one,), (expected,)
        assert all(map(torch.equal, one, expected))
    return counted.calls


def test_only_the_first_call_calls_the_function():
    assert agrees(add, *(drawn() for _ in range(4))) == 1


def test_results_are_in_memory_of_their_own_or_in_that_of_the_first():
    fresh, kept = Repeated(add, fresh=True), Repeated(add, fresh=False)
    results = [fresh(*drawn()) for _ in range(3)]  # all of them alive
    assert len({t.data_ptr() for t in results}) == 3
    first = kept(*drawn())
    assert kept(*drawn()) is first


def test_several_launches_and_memory_between_them():
    def twice(x, y, factor):
        between = torch.empty_like(x)
        out = torch.empty(2, x.numel())
        launch(KERNEL, (1,), between, x, y, factor, num_warps=1)
        launch(KERNEL, (1,), out[1], between, x, 1.0, num_warps=1)
        launch(KERNEL, (1,), out[0], y, between, 3.0, num_warps=1)
        return out, x.new_empty(0)

    assert agrees(twice, *((*drawn(), 0.5) for _ in range(3))) == 1


def test_parts_of_an_argument():
    def parts(both):
        return add(*both.unbind())

    assert agrees(parts, *((both,) for both in torch.randn(3, 2, 8))) == 1


def test_an_argument_that_is_given_twice():
    same = [torch.randn(8) for _ in range(3)]
    assert agrees(add, *((t, t) for t in same)) == 1
    assert agrees(add, (same[0], same[0]), drawn(), (same[1], same[1])) == 2


def test_a_copy_of_an_argument_is_made_again():
    def of_copies(x, y):
        return add(x[::2].contiguous(), y)

    assert agrees(of_copies, *((torch.randn(16), torch.randn(8)) for _ in range(3))) == 3


def test_what_is_not_read_must_be_the_same():
    unread = torch.randn(3)
    calls = [(*drawn(), unread) for _ in range(3)]
    assert agrees(lambda x, y, z: add(x, y), *calls) == 1
    assert agrees(lambda x, y, z: add(x, y), *calls, (*drawn(), torch.randn(3))) == 2


def test_what_no_kernel_has_computed_is_computed_again():
    assert agrees(lambda x, y: x * y, *(drawn() for _ in range(3))) == 3
    assert agrees(lambda x, y: (add(x, y), x * y), *(drawn() for _ in range(3))) == 3


def test_in_place():
    def add_(x, y):
        launch(KERNEL, (1,), x, x, y, 2.0, num_warps=1)
        return x

    counted = Counted(add_)
    repeated = Repeated(counted, fresh=False)
    for _ in range(3):
        x, y = drawn()
        expected = x + y * 2.0
        assert repeated(x, y) is x and torch.equal(x, expected)
    assert counted.calls == 1


def subtract(x, y):
    return add(x, y, -1.0)


def layers(repeats, functions, facts=(), count=3):
    """Layers that call these functions one after the other; how often these are called."""
    before = [function.calls for function in functions]
    for _ in range(count):
        x, y = drawn()
        run = repeats.start(x, *facts)
        for function in functions:
            assert torch.equal(run(function, x, y), function.function(x, y))
    return [f.calls - calls for f, calls in zip(functions, before, strict=True)]


def test_each_step_of_a_layer_is_repeated():
    one, other = Counted(add), Counted(subtract)
    assert layers(Repeats(), [one, other, one]) == [2, 1, 2], "it may be on other sizes"


def test_other_facts_and_other_threads_are_apart():
    repeats = Repeats()
    step = [Counted(add)]
    assert layers(repeats, step, (True, None)) == [1]
    assert layers(repeats, step, (False, None)) == [1]
    found = []
    thread = threading.Thread(target=lambda: found.append(layers(repeats, step, (True, None))))
    thread.start(), thread.join()
    assert found == [[1]]


def test_a_layer_may_leave_out_a_step():
    repeats, one, other = Repeats(), Counted(add), Counted(subtract)
    layers(repeats, [one, other])
    assert layers(repeats, [other]) == [0]


def test_who_watches_operations_sees_each():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        assert Repeats().start(torch.zeros(8)) is once
    assert once(add, *(pair := drawn())).equal(add(*pair))
