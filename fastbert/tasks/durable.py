"""Files and folders that are there whole or not at all, whenever a process or a machine ends."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import OutputError

__all__ = [
    "REPLACED",
    "publish",
    "recover",
    "remove",
    "take_lock",
    "to_disk",
    "write_json",
    "write_text",
]

REPLACED = ".replaced-"


def to_disk(file) -> None:
    """Everything written to an open file, on the disk."""
    file.flush()
    os.fsync(file.fileno())


def write_json(path: Path, value: object, **options) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(value, **options))


def write_text(path: Path, text: str) -> None:
    """Write a file in place of the one that was there, in one step."""
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        to_disk(file)
    new.replace(path)


def take_lock(path: Path, doing: str) -> FileLock:
    """The lock of something that one process does at a time; release it behind.

    Raises:
        OutputError: another process has it.
    """
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(
            f"expected to {doing} alone, got another process that does so now; wait for it, or "
            "name another one"
        ) from None
    return lock


def publish(folder: Path, target: Path) -> None:
    """Give a folder that is complete its name, once all of it is on the disk.

    A folder of that name gives way to it: it is `REPLACED` + its name, until it is gone. Ended
    between two steps, that and no other is left (`recover`).
    """
    for path in [*folder.rglob("*"), folder]:
        _sync(path)
    if target.exists():
        remove(target, behind=lambda: folder.rename(target))
    else:
        folder.rename(target)
    _sync(target.parent)


def remove(folder: Path, behind: Callable[[], object] | None = None) -> None:
    """Take a folder away without leaving half of it under its name.

    Args:
        behind: called when the name is free.
    """
    old = folder.with_name(REPLACED + folder.name)
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    if behind is not None:
        behind()
    shutil.rmtree(old)


def recover(inside: Path) -> None:
    """Bring back what was to be replaced by something that never came, and remove the rest."""
    for old in inside.glob(f"{REPLACED}*"):
        target = old.with_name(old.name.removeprefix(REPLACED))
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
