"""Providers in processes of their own, so that none is slowed down by another's threads.

Libraries that share a process get into each other's way even when only one of them is called: after
one call of CTranslate2 a MiniLM of 16 tokens took 10 ms in torch instead of 5.5.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from .timing import Clock, Sample
from .workload import Prepared, Started, Unavailable, Workload

__all__ = ["Apart"]

_PATIENCE = 10.0  # seconds that a process has to end by itself


class Apart:
    """A process for each provider, kept for the workloads that follow.

    Its `start` is one for `fastbert.benchmarks.workload.measure`. Workloads must pickle: their
    setup is a function of a module.
    """

    def __init__(self):
        self._children: dict[str, _Child] = {}

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *exc: object) -> None:
        for child in self._children.values():
            child.end()
        self._children.clear()

    def start(self, workload: Workload, prepared: Prepared, provider: str, device: str) -> _Remote:
        """Build a provider in its process and call it once.

        Raises:
            What it raises there; RuntimeError if the process does not survive it.
        """
        if provider not in self._children or not self._children[provider].lives:
            self._children[provider] = _Child(provider)
        child = self._children[provider]
        return _Remote(child, child.ask("start", workload, provider, device))


class _Remote:
    """`fastbert.benchmarks.workload.Started`, elsewhere."""

    def __init__(self, child: _Child, shown: Any):
        self._child = child
        self.shown = shown

    def prepare(self, clock: Clock) -> Callable[[], Sample]:
        self._child.ask("prepare", clock)
        return lambda: self._child.ask("sample")

    def peak_memory(self) -> int | None:
        return self._child.ask("peak_memory")


class _Child:
    """This end of a process that answers `_serve`'s questions."""

    def __init__(self, name: str):
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, torch.get_num_threads()), daemon=True
        )
        self._process.start()
        theirs.close()  # so that the end of the process is the end of what can be read

    @property
    def lives(self) -> bool:
        return self._process.is_alive()

    def ask(self, question: str, *args: object) -> Any:
        try:
            self._connection.send_bytes(pickle.dumps((question, args)))
            answer, error = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as ended:
            self._process.join()
            raise RuntimeError(
                f"the process of {self._name} ended with {self._process.exitcode}"
            ) from ended
        if error is not None:
            raise error
        return answer

    def end(self) -> None:
        self._connection.close()
        self._process.join(_PATIENCE)
        self._process.terminate()
        self._process.join()


def _serve(connection: Connection, threads: int) -> None:
    """Answer questions until nobody is left to ask them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks ends this process
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # of peers: prototypes, deprecated exporters
    started = sample = None
    while True:
        try:
            question, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        answer = error = None
        try:
            if question == "start":
                workload, provider, device = args
                started = sample = None  # before the next one takes memory
                started = Started(workload, workload.setup(workload, device), provider, device)
                answer = started.shown
            elif question == "prepare":
                sample = started.prepare(*args)
            elif question == "sample":
                answer = sample()
            else:
                answer = started.peak_memory()
        except Exception as raised:
            error = _that_pickles(raised)
        connection.send_bytes(pickle.dumps((answer, error)))


def _that_pickles(error: Exception) -> Exception:
    """The exception, or its words where it is of a kind that cannot be sent."""
    try:
        again = pickle.loads(pickle.dumps(error))
    except Exception:
        again = None
    if type(again) is type(error) and str(again) == str(error):
        return error
    kind = Unavailable if isinstance(error, Unavailable) else RuntimeError
    return kind(f"{type(error).__name__}: {error}")
