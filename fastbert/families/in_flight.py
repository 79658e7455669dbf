"""Calls that run while another thread changes what a model is.

`fastbert.accelerate` and its ``undo`` give modules other classes. A call that is inside a model by
then finishes on the path that it began on: the change waits for it, and calls that come meanwhile
wait for the change.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

__all__ = ["calling", "changing", "is_inside"]

_state = threading.Condition()
_calls: dict[int, Counter[int]] = {}  # by thread: how often it is inside which object
_closed: Counter[int] = Counter()  # objects that are being changed, or about to be


@contextmanager
def calling(model: object) -> Iterator[None]:
    """For the length of a call of ``model``; a call inside another of this thread never waits."""
    me, key = threading.get_ident(), id(model)
    with _state:
        mine = _calls.get(me)
        if mine is None:
            while _closed and key in _closed:
                _state.wait()
            mine = _calls.setdefault(me, Counter())
        mine[key] += 1
    try:
        yield
    finally:
        with _state:
            mine[key] -= 1
            if not mine[key]:
                del mine[key]
                if not mine:
                    del _calls[me]
                if _closed:
                    _state.notify_all()


def is_inside(model: object) -> bool:
    """Whether this thread is `calling` it."""
    mine = _calls.get(threading.get_ident())
    return mine is not None and id(model) in mine


@contextmanager
def changing(models: Iterable[object]) -> Iterator[None]:
    """For the length of a change of ``models``, when no call is inside any of them.

    Raises:
        RuntimeError: this thread itself is inside one of them, in a hook for instance.
    """
    me, keys = threading.get_ident(), {id(model) for model in models}
    with _state:
        if keys & set(_calls.get(me, ())):
            raise RuntimeError(
                "fastbert: expected accelerate() and undo() outside of a call of the model, got "
                "one inside, from a hook or a forward"
            )
        _closed.update(keys)
        try:
            while any(keys & set(inside) for inside in _calls.values()):
                _state.wait()
        except BaseException:
            _reopen(keys)
            raise
    try:
        yield
    finally:
        with _state:
            _reopen(keys)


def _reopen(keys: set[int]) -> None:
    _closed.subtract(keys)
    for key in keys:
        if _closed[key] <= 0:
            del _closed[key]
    _state.notify_all()
