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
_calls: dict[int, dict[int, int]] = {}  # by thread: how often it is inside which object
_closed: Counter[int] = Counter()  # objects that are being changed, or about to be


class calling:
    """For the length of a call of ``model``; a call inside another of this thread never waits."""

    # Not a generator with `contextmanager`, which takes several times as long in every call.
    __slots__ = ("_key", "_mine", "_thread")

    def __init__(self, model: object):
        self._key, self._thread = id(model), threading.get_ident()

    def __enter__(self) -> None:
        with _state:
            mine = _calls.get(self._thread)
            if mine is None:
                while _closed and self._key in _closed:
                    _state.wait()
                mine = _calls[self._thread] = {}
            mine[self._key] = mine.get(self._key, 0) + 1
        self._mine = mine

    def __exit__(self, *exc: object) -> None:
        mine, key = self._mine, self._key
        with _state:
            mine[key] -= 1
            if not mine[key]:
                del mine[key]
                if not mine:
                    del _calls[self._thread]
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
