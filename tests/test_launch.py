"""A launch that was seen before skips what Triton finds out, and nothing else ever does.

The kernels and the driver here are stand-ins that note how they were called.
"""

import weakref
from types import SimpleNamespace

import pytest
import torch

_launch = pytest.importorskip("fastbert.kernels._launch", exc_type=ImportError)

NAMES = ("out_ptr", "x_ptr", "mean_ptr", "stride", "M", "scale", "N", "BLOCK")


def parameter(name):
    return SimpleNamespace(
        name=name,
        is_constexpr=name.isupper() and name != "M",
        do_not_specialize=name == "M",
        do_not_specialize_on_alignment=name == "mean_ptr",
    )


class Kernel(_launch.JITFunction):
    """Notes who was launched how: by Triton's way (``slow``), or as it was compiled (``fast``)."""

    def __init__(self):
        self.params = [parameter(name) for name in NAMES]
        self.slow, self.fast = [], []

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.slow.append((grid, args, constants))
            return SimpleNamespace(
                run=lambda *a: self.fast.append(a), function="function", packed_metadata="packed"
            )

        return run


@pytest.fixture
def kernel(monkeypatch):
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda d: f"of {d}")
    monkeypatch.setattr(_launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(_launch, "_known", {})
    return Kernel()


def launch(kernel, out, x, mean, stride=768, m=10, scale=0.5, grid=(4,), n=768, warps=4):
    _launch.launch(kernel, grid, out, x, mean, stride, m, scale, N=n, BLOCK=1024, num_warps=warps)


@pytest.fixture
def tensors():
    return torch.zeros(64), torch.zeros(64), torch.zeros(64)[1:]  # the last one is not aligned


def test_the_second_launch_has_the_same_arguments_in_the_same_order(kernel, tensors):
    launch(kernel, *tensors)
    launch(kernel, *tensors, m=11, grid=(5, 2))
    ((grid, args, constants),) = kernel.slow
    assert grid == (4,) and constants == {"N": 768, "BLOCK": 1024, "num_warps": 4}
    ((x, y, z, stream, function, packed, *hooks_and_args),) = kernel.fast
    assert (x, y, z, stream, function, packed) == (5, 2, 1, "of 0", "function", "packed")
    assert hooks_and_args[:3] == [None, None, None]
    assert all(a is b for a, b in zip(hooks_and_args[3:6], tensors, strict=True))
    assert hooks_and_args[6:] == [768, 11, 0.5, 768, 1024]
    assert len(args) == 6


@pytest.mark.parametrize(
    "change",
    [
        dict(stride=769), dict(stride=1), dict(scale=0.25), dict(n=384), dict(warps=8),
        dict(out=torch.zeros(64, dtype=torch.float16)), dict(x=None),
        dict(x=torch.zeros(65)[1:]), dict(m=2**31),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_compiler_may_have_made_use_of_goes_triton_s_way(kernel, tensors, change):
    names = ("out", "x", "mean")
    launch(kernel, *tensors)
    launch(kernel, **{**dict(zip(names, tensors, strict=True)), **change})
    assert len(kernel.slow) == 2 and not kernel.fast
    launch(kernel, *tensors)
    assert len(kernel.fast) == 1, "the first one was forgotten"


def test_a_kernel_compiled_for_a_pointer_that_is_not_aligned_is_not_taken_for_aligned_ones(
    kernel, tensors
):
    out, _, mean = tensors
    apart = torch.zeros(65)[1:]
    for _ in range(2):
        launch(kernel, out, apart, mean)
    assert len(kernel.slow) == 2
    launch(kernel, *tensors)
    launch(kernel, *tensors)
    assert len(kernel.slow) == 3 and len(kernel.fast) == 1


def test_hooks_on_launches_are_called_by_triton(kernel, tensors, monkeypatch):
    import triton

    launch(kernel, *tensors)
    hook = triton.knobs.runtime.launch_enter_hook
    monkeypatch.setattr(hook, "calls", [print])
    launch(kernel, *tensors)
    assert len(kernel.slow) == 2 and not kernel.fast
    monkeypatch.setattr(hook, "calls", [])
    launch(kernel, *tensors)
    assert len(kernel.fast) == 1


def test_another_device_has_another_kernel(kernel, tensors, monkeypatch):
    launch(kernel, *tensors)
    monkeypatch.setattr(_launch.driver.active, "get_current_device", lambda: 1)
    launch(kernel, *tensors)
    assert len(kernel.slow) == 2


def test_what_is_remembered_is_bounded(kernel, tensors, monkeypatch):
    monkeypatch.setattr(_launch, "_AT_MOST", 3)
    for stride in range(2, 12):
        launch(kernel, *tensors, stride=stride)
    (known,) = _launch._known.values()
    assert len(known.compiled) <= 3


def noted(kernel, tensors):
    with _launch.noted() as made:
        launch(kernel, *tensors)
    (note,) = made
    return note


def others():
    return torch.zeros(64), torch.zeros(64)


def test_a_noted_launch_is_made_again_on_the_addresses_of_other_tensors(kernel, tensors):
    launch(kernel, *tensors)
    launch(kernel, *tensors)
    note = noted(kernel, tensors)
    assert note.over(tensors[:2]) == {0, 1}
    new = others()
    note(*new)
    assert len(kernel.slow) == 1 and len(kernel.fast) == 3
    before, after = kernel.fast[-2:]
    assert after[:9] == before[:9], "the same grid, stream and function"
    assert after[9:12] == tuple(t.data_ptr() for t in (*new, tensors[2]))
    assert after[12:] == before[12:]
    with _launch.noted() as made:
        note(*new)
    assert made == [], "what is made again is not noted"


def test_a_noted_launch_keeps_no_memory_of_the_tensors_that_will_be_others(kernel, tensors):
    out, x, mean = tensors
    launch(kernel, out, x, mean)
    own = torch.zeros(64)
    gone = weakref.ref(own)
    note = noted(kernel, (out, own, mean))
    assert note.over([own])
    del own
    kernel.slow.clear(), kernel.fast.clear()
    assert gone() is None


@pytest.mark.parametrize("why", ["first", "alignment", "hook", "device"])
def test_a_noted_launch_that_needs_triton_is_launched_by_it(kernel, tensors, why, monkeypatch):
    import triton

    new = others()
    if why != "first":
        launch(kernel, *tensors)
    if why == "hook":
        monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    if why == "device":
        monkeypatch.setattr(_launch.driver.active, "get_current_device", lambda: 1)
    note = noted(kernel, tensors)
    assert note.over(tensors[:2])
    if why == "alignment":
        new = torch.zeros(65)[1:], new[1]
    kernel.slow.clear(), kernel.fast.clear()
    note(*new)
    made = kernel.slow or kernel.fast
    assert len(kernel.slow) == (why in ("alignment", "hook")), "the others are known by now"
    values = made[0][1][:3] if kernel.slow else made[0][9:12]
    assert all(a is b for a, b in zip(values, (*new, tensors[2]), strict=True))


def test_tensors_at_one_address_cannot_be_told_apart(kernel, tensors):
    out, x, mean = tensors
    assert noted(kernel, (out, x, mean)).over([out, None, x]) == {0, 2}
    assert noted(kernel, (out, x, mean)).over([out, x, x.view(8, 8)]) is None
    assert noted(kernel, (out, x, mean)).over([out, torch.zeros(3)]) == {0}, "not an argument"
    twice = noted(kernel, (x, x, mean))
    assert twice.over([x]) == {0}, "read and written in place"
    (new,) = others()[:1]
    twice(new)
    assert kernel.slow[-1][1][0] is kernel.slow[-1][1][1] is new or kernel.fast


@pytest.mark.parametrize("way", ["prepared", "looked up"])
def test_an_argument_may_be_a_part_of_a_tensor_that_will_be_another(kernel, way):
    both, x = torch.zeros(4, 64), torch.zeros(64)
    launched = both[2], x, both[1]
    if way == "prepared":
        launch(kernel, *launched)
    note = noted(kernel, launched)
    assert note.over([x, both]) == {0, 1}
    new, other = torch.zeros(4, 64), torch.zeros(64)
    kernel.slow.clear(), kernel.fast.clear()
    note(other, new)
    ((*_, out, first, mean, _, _, _, _, _),) = kernel.fast
    parts = new[2], other, new[1]
    if way == "prepared":
        assert [out, first, mean] == [t.data_ptr() for t in parts]
        return
    for found, part in zip((out, first, mean), parts, strict=True):
        assert found.data_ptr() == part.data_ptr() and found.shape == part.shape


def test_an_argument_behind_a_tensor_is_no_part_of_it(kernel):
    memory, x = torch.zeros(4, 64), torch.zeros(64)
    note = noted(kernel, (memory[2], x, memory[1]))
    assert note.over([memory[0], x]) == {1}


def test_interpreted_kernels_are_called_as_they_are():
    called = []

    class Interpreted:
        def __getitem__(self, grid):
            return lambda *args, **constants: called.append((grid, args, constants))

    _launch.launch(Interpreted(), (2,), torch.zeros(1), 3, N=1, num_warps=4)
    assert called[0][0] == (2,) and called[0][2] == {"N": 1, "num_warps": 4}


def test_every_kernel_names_its_pointers_and_has_its_constants_last():
    """Which is how `launch` tells them apart."""
    from fastbert.kernels._variants import KERNELS, variants

    for name in KERNELS:
        for variant in variants(name, 90, dtypes=(torch.bfloat16, torch.float32)):
            names = list(variant.kernel.arg_names)
            constants = [n for n in names if n in variant.constants and n.isupper()]
            assert names[-len(constants) :] == constants
            for n, kind in variant.signature.items():
                assert n.endswith("_ptr") == kind.startswith("*"), (variant.name, n)
