"""Programs in processes of their own that begin with everything imported.

A server that has imported it forks them, in a fraction of a second; an interpreter that starts
takes many. They run as users have them: without Triton's interpreter, and with Ctrl-C.
"""

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["warm"])
_HERE = str(Path(__file__).parent)
COMMAND = "from fastbert.cli import main; main()"


def call(function: Callable, *arguments: object) -> int:
    """Call a function of a module; its exit code, below zero that of a signal."""
    return _ended(_start(function, *arguments))


def forked(program: str, *arguments: object, text: str = "", **variables: str):
    """What ``python -c PROGRAM ARGUMENTS`` does, with ``text`` to read and further variables.

    Variables that are read while torch or transformers is imported have no effect any more.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _result(program, _start_program(program, arguments, text, variables, folder), folder)


def launched(program: str, *arguments: object, processes: int, **variables: str) -> list:
    """What ``torchrun --nproc-per-node PROCESSES`` does; one result for each of them."""
    # As in torchrun: the system chooses the port, so that nobody else has it.
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port),
                  "TORCHELASTIC_USE_AGENT_STORE": "True",
                  "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in map(str, range(processes)):
            (Path(folder) / rank).mkdir()
            own = variables | {"RANK": rank, "LOCAL_RANK": rank}
            started.append(_start_program(program, arguments, "", own, f"{folder}/{rank}"))
        return [_result(program, p, f"{folder}/{rank}") for rank, p in enumerate(started)]


def context() -> multiprocessing.context.BaseContext:
    """What processes are made of, its server running."""
    before = {name: os.environ.pop(name, None) for name in ("TRITON_INTERPRET", "PYTHONPATH")}
    # The server does not get our `sys.path`, and goes without a module that it does not find.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (before["PYTHONPATH"], _HERE)))
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        os.environ.update({name: value for name, value in before.items() if value is not None})
    return _CONTEXT


def _start(function: Callable, *arguments: object) -> multiprocessing.Process:
    process = context().Process(target=_begin, args=(function, *arguments))
    process.start()
    return process


def _start_program(program, arguments, text, variables, folder) -> multiprocessing.Process:
    (Path(folder) / "0").write_text(text)
    return _start(_run, program, [*map(str, arguments)], variables, folder)


def _ended(process: multiprocessing.Process) -> int:
    process.join(300)
    if process.is_alive():
        process.kill()
        raise AssertionError("a process hangs")
    return process.exitcode


def _result(program: str, process: multiprocessing.Process, folder: str):
    code = _ended(process)
    said = [(Path(folder) / name).read_text() for name in "12"]
    return subprocess.CompletedProcess(program, code, *said)


def _begin(function: Callable, *arguments: object) -> None:
    """In the process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    torch.set_num_threads(1)
    function(*arguments)


def _run(program: str, arguments: list[str], variables: dict[str, str], folder: str) -> None:
    for number, flags in enumerate((os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2)):
        found = os.open(f"{folder}/{number}", flags)
        if found != number:  # the server has closed 0
            os.dup2(found, number)
            os.close(found)
    sys.stdin, sys.stdout, sys.stderr = (open(n, m) for n, m in enumerate("rww"))  # noqa: SIM115
    os.environ.update(variables)
    sys.argv = ["-c", *arguments]
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing ends without, folders stay behind
