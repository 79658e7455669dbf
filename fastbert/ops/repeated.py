"""Launches of layers that are alike: found out for the first layer, made again for the others.

What an op finds out before a launch (a tile, a grid, which sums are wanted) follows from dtypes and
sizes, and so does the launch itself, but for addresses. A caller that knows its layers to be alike
calls their ops through these and pays for the finding out once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .registry import takes_launches

if TYPE_CHECKING:
    from ..kernels._launch import Again

__all__ = ["Repeated", "Repeats", "Run", "once"]

# How a function that launches kernels is called: `once`, or what `Repeats.start` gives.
Run = Callable[..., Any]


def once(function: Callable, *args: Any) -> Any:
    """``function(*args)``."""
    return function(*args)


class Repeated:
    """A function that launches kernels, for calls on tensors of the same dtypes, sizes and strides
    and on equal other arguments, all of them by the same thread on the same stream.

    Args:
        function: gives a tensor or several. All that is in these comes from the kernels; each is in
            memory of its own, or the only one is the first argument.
        fresh: whether results are in new memory in each call. Otherwise they are in that of the
            first call's, for who has read them before the next call.
    """

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]], fresh: bool):
        self.function, self._fresh = function, fresh
        self._launches: list[Again] = []
        self._makers: list[Callable[[], Tensor]] = []
        self._unread: list[tuple[int, int]] = []  # number of an argument, its address
        self._twice: list[tuple[int, int]] = []  # numbers of an argument that is given twice
        self._called = self._single = self._in_place = False

    def __call__(self, *args: Any) -> Tensor | tuple[Tensor, ...]:
        if not self._launches or (self._unread and self._others(args)):
            return self.function(*args) if self._called else self._first(args)
        if self._twice and any([args[i] is not args[j] for i, j in self._twice]):
            return self.function(*args)
        results = [make() for make in self._makers]
        for launch in self._launches:
            launch(*args, *results)
        if self._in_place:
            return args[0]
        return results[0] if self._single else tuple(results)

    def _others(self, args: tuple) -> bool:
        return any([args[i].data_ptr() != at for i, at in self._unread])

    def _first(self, args: tuple) -> Tensor | tuple[Tensor, ...]:
        from ..kernels._launch import noted

        self._called = True
        with noted() as made:
            found = self.function(*args)
        self._in_place = found is args[0]
        self._single = isinstance(found, Tensor)
        results = () if self._in_place else (found,) if self._single else found
        given: list[Tensor | None] = []
        numbers: dict[int, int] = {}  # by identity: where it stands first
        twice = []
        for i, t in enumerate((*args, *results)):
            tensor = t if isinstance(t, Tensor) else None
            if tensor is not None and numbers.setdefault(id(t), i) != i:
                twice.append((i, numbers[id(t)]))
                tensor = None
            given.append(tensor)
        read = [launch.over(given) for launch in made]
        if None in read:
            return found
        known = set().union(*read)
        unread = [i for i, t in enumerate(given) if t is not None and i not in known and t.numel()]
        if all(i < len(args) for i in unread):
            self._makers = [self._maker(t) for t in results]
            # A kernel may have read a copy of it, which is no copy of another one.
            self._unread = [(i, given[i].data_ptr()) for i in unread]
            self._twice = twice
            self._launches = made
        return found

    def _maker(self, result: Tensor) -> Callable[[], Tensor]:
        if not self._fresh or not result.numel():
            return lambda: result
        form = {"dtype": result.dtype, "device": result.device}
        return partial(torch.empty_strided, tuple(result.shape), result.stride(), **form)


class Repeats:
    """What layers that are alike call, one layer after the other, forward and then backward."""

    def __init__(self):
        self._steps: dict[tuple, dict[tuple, Repeated]] = {}

    def start(self, x: Tensor, *facts: Any) -> Run:
        """How to call functions for one layer in one direction.

        Args:
            x: its rows, or the gradient of its result.
            facts: all that dtypes and other arguments of what is called depend on.
        """
        if not takes_launches((x,)):
            return once
        key = get_ident(), x.dtype, *facts
        steps = self._steps.get(key)
        if steps is None:
            steps = self._steps[key] = {}
        return _Steps(steps)


class _Steps:
    """Calls functions for one layer: a function's second call there is as other layers' second."""

    __slots__ = ("_calls", "_steps")

    def __init__(self, steps: dict[tuple, Repeated]):
        self._steps = steps
        self._calls: dict[Callable, int] = {}

    def __call__(self, function: Callable, *args: Any) -> Any:
        number = self._calls[function] = self._calls.get(function, 0) + 1
        step = self._steps.get((function, number))
        if step is None:
            step = self._steps[function, number] = Repeated(function, fresh=True)
        return step(*args)
