"""Launching a kernel, quickly: what Triton finds out about its arguments each time, found once.

`launch` is called as ``kernel[grid](...)`` is, with the runtime arguments by position and all else
by name. Triton sorts arguments into classes at each launch (dtypes, which pointers and sizes are
multiples of 16, which sizes are 1) and looks up the kernel that was compiled for them. Here they
are compared by value, which needs no sorting and can only tell more apart: the same values are the
same class. A pointer that is not aligned, a hook on launches or the interpreter take Triton's way.

`noted` is for who makes the same launch over and over on other tensors: it can be made again
without a look at anything but their addresses.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

__all__ = ["Again", "launch", "loaded", "noted"]

_INT32 = 2**31
_AT_MOST = 4096  # remembered for one kernel, before all is forgotten


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constants: Any
) -> None:
    """Launch on the device of the first argument, on its current stream.

    Args:
        kernel: made by ``triton.jit``. Names of pointers end with ``_ptr``; constants come last.
        grid: programs, one to three numbers.
        args: what the kernel takes at run time, in its order; a number that is a float must be one
            in every launch.
        constants: what it takes as ``tl.constexpr``, ``num_stages``, and ``maxnreg``, None for any.
    """
    note = None
    if _notes.made is not None:
        note = Again(partial(launch, kernel, grid, num_warps=num_warps, **constants), args)
        _notes.made.append(note)
    known = _known.get(id(kernel))
    if known is None:
        if not isinstance(kernel, JITFunction):  # interpreted
            kernel[grid](*args, num_warps=num_warps, **constants)
            return
        known = _known[id(kernel)] = _Known(kernel)
    active = driver.active
    device, index = active.get_current_device(), args[0].device.index
    if index is not None and index != device:
        made, _notes.made = _notes.made, None  # it is noted already
        try:
            with torch.cuda.device(index):
                launch(kernel, grid, *args, num_warps=num_warps, **constants)
        finally:
            _notes.made = made
        return
    pointers = known.pointers(args)
    key = (
        device,
        num_warps,
        known.fixed(args),
        tuple([None if t is None else t.dtype for t in pointers]),
        tuple(constants.items()),
    )
    found = known.compiled.get(key)
    if found is None:
        compiled = kernel[grid](*args, num_warps=num_warps, **constants)
        if known.aligned(pointers):
            known.remember(key, compiled, constants)
        return
    values, run, function, metadata, enter, leave = found
    places = 0
    for t in pointers:
        if t is not None:
            places |= t.data_ptr()
    if (
        (places & 15 and not known.aligned(pointers))
        or not all([-_INT32 <= n < _INT32 for n in known.free(args)])
        or enter.calls
        or leave.calls
    ):
        kernel[grid](*args, num_warps=num_warps, **constants)
        return
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    stream = active.get_current_stream(device)
    run(x, y, z, stream, function, metadata, None, None, None, *args, *values)
    if note is not None:
        again = partial(run, x, y, z, stream, function, metadata, None, None, None)
        note.prepare(again, values, known.anywhere)


def loaded() -> list[CompiledKernel]:
    """What Triton has compiled in this process and loaded onto a device."""
    # By its type: `isinstance` asks a weak proxy whose object is gone for its class, which raises.
    found = [o for o in gc.get_objects() if issubclass(type(o), CompiledKernel)]
    return [kernel for kernel in found if kernel.module is not None]


class _Notes(threading.local):
    made: list[Again] | None = None


_notes = _Notes()


@contextmanager
def noted() -> Iterator[list[Again]]:
    """The launches that this thread makes inside the block, in their order."""
    before, _notes.made = _notes.made, []
    try:
        yield _notes.made
    finally:
        _notes.made = before


class _Slot(NamedTuple):
    """An argument of a launch that is in one of the tensors that will be others.

    Attributes:
        argument: its number.
        tensor: the number of the tensor.
        offset: bytes from the start of the tensor to that of the argument.
        anywhere: whether the kernel makes no use of where it starts.
        view: shape and stride of the argument if they are not those of the tensor.
    """

    argument: int
    tensor: int
    offset: int
    anywhere: bool
    view: tuple | None


class Again:
    """A launch that was made, to be made again by the same thread, on the same stream, on other
    tensors of the same dtypes, sizes and strides.

    Triton is handed addresses then, which it need not ask the driver about.
    """

    def __init__(self, launch: Callable[..., None], args: tuple):
        self._launch, self._args = launch, list(args)
        self._slots: list[_Slot] = []
        self._run: Callable[..., None] | None = None
        self._anywhere: frozenset[int] = frozenset()

    def prepare(self, run: Callable[..., None], constants: tuple, anywhere: frozenset[int]) -> None:
        """Do without `launch`, whose checks these arguments have passed.

        Args:
            run: launches on all arguments.
            constants: what it takes behind them.
            anywhere: numbers of the arguments that need not start at a multiple of 16 bytes.
        """
        self._run, self._anywhere = run, anywhere
        self._given = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in self._args]
        self._given += constants

    def over(self, tensors: Sequence[torch.Tensor | None]) -> set[int] | None:
        """Say which tensors will be others.

        Args:
            tensors: that this launch, or another one, was made on, told by their addresses; an
                argument may also be a part of one. None where the kernel got none.

        Returns:
            The numbers of those that it was made on; None if they cannot be told apart, and the
            launch is of no more use.
        """
        places = [0 if t is None else t.data_ptr() for t in tensors]
        given = {place: j for j, place in enumerate(places) if place}
        if len(given) != len(places) - places.count(0):
            return None
        self._slots = []
        for i, t in enumerate(self._args):
            if not isinstance(t, torch.Tensor):
                continue
            place = t.data_ptr()
            tensor, offset = given.get(place), 0
            if tensor is None and place:
                # It may be a part of the last one that starts before it.
                start = max([at for at in given if at < place], default=None)
                if start is None or place >= _end(tensors[given[start]]):
                    continue
                tensor, offset = given[start], place - start
            if tensor is not None:
                form, whole = (t.shape, t.stride()), tensors[tensor]
                view = None if form == (whole.shape, whole.stride()) else form
                self._slots.append(_Slot(i, tensor, offset, i in self._anywhere, view))
        for slot in self._slots:
            self._args[slot.argument] = None  # whose memory is free to be used again
        return {slot.tensor for slot in self._slots}

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """Make it on others than those of `over`."""
        if self._run is not None:
            given, places = self._given, 0
            for argument, tensor, offset, anywhere, _ in self._slots:
                place = given[argument] = tensors[tensor].data_ptr() + offset
                if not anywhere:
                    places |= place
            if not places & 15:
                self._run(*given)
                return
        args = self._args.copy()
        for argument, tensor, offset, _, view in self._slots:
            t = tensors[tensor]
            if view is not None:
                t = t.as_strided(*view, t.storage_offset() + offset // t.itemsize)
            args[argument] = t
        self._launch(*args)


def _end(t: torch.Tensor) -> int:
    """The address behind the last element."""
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr() + (last + 1) * t.itemsize


def _getter(indices: list[int]) -> Callable[[tuple], tuple]:
    """The values at these indices, as a tuple also where there is one or none."""
    if len(indices) > 1:
        return itemgetter(*indices)
    return (lambda args: (args[indices[0]],)) if indices else (lambda args: ())


class _Known:
    """A kernel, how its arguments are read, and what was compiled of it.

    Attributes:
        pointers, fixed, free: the arguments that are pointers; numbers that the compiler may make
            use of; numbers whose size alone matters to it.
        anywhere: numbers of the pointers of whose alignment it makes no use.
    """

    def __init__(self, kernel: JITFunction):
        self.kernel = kernel
        self.compiled: dict[tuple, tuple] = {}
        runtime = [(i, p) for i, p in enumerate(kernel.params) if not p.is_constexpr]
        pointers = [i for i, p in runtime if p.name.endswith("_ptr")]
        numbers = [(i, p.do_not_specialize) for i, p in runtime if i not in pointers]
        self.pointers = _getter(pointers)
        self.fixed = _getter([i for i, free in numbers if not free])
        self.free = _getter([i for i, free in numbers if free])
        anywhere = {p.name for _, p in runtime if p.do_not_specialize_on_alignment}
        self.anywhere = frozenset(i for i in pointers if kernel.params[i].name in anywhere)
        self._anywhere = [i in self.anywhere for i in pointers]
        self._constants = [p.name for p in kernel.params if p.is_constexpr]

    def aligned(self, pointers: tuple) -> bool:
        """Whether all pointers start at multiples of 16 bytes whose alignment is made use of."""
        return not any(
            t is not None and not anywhere and t.data_ptr() & 15
            for t, anywhere in zip(pointers, self._anywhere, strict=True)
        )

    def remember(self, key: tuple, compiled: Any, constants: dict[str, Any]) -> None:
        """Keep what a launch needs of a compiled kernel."""
        hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
        if not all(hasattr(hook, "calls") for hook in hooks):  # another version's idea of hooks
            return
        if len(self.compiled) >= _AT_MOST:
            self.compiled.clear()
        values = tuple(constants[name] for name in self._constants)
        self.compiled[key] = (
            values, compiled.run, compiled.function, compiled.packed_metadata, *hooks,
        )  # fmt: skip


_known: dict[int, _Known] = {}  # by identity, which holds: a `_Known` holds its kernel
