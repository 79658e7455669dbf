"""The folder of a run: what it is, how far it is, and how it went.

::

    RUN/run.json        what the run follows from; who goes on with it must have the same
        tokenizer/      if one was trained
        lock            held while a process trains here
        metrics.jsonl   a line for every step and every evaluation
        checkpoints/    step-N: everything that going on takes; only whole ones have that name
        best/, final/   models, as transformers saves them
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from ..tasks.durable import publish, recover, remove, take_lock, to_disk, write_json
from ..tasks.errors import InputError, OutputError

__all__ = ["RunFolder", "writing_in"]

_NEW = ".new-"  # what is not whole yet
_STEP = re.compile(r"step-(\d+)")


class RunFolder:
    """One run, while this process trains it. Use as a context manager.

    Args:
        path: of the folder, which is made.
        kind: of run, such as ``pretrain``.
        keep: how many checkpoints are kept.
        is_main: whether this is the one process of a run that writes; the others only look.

    Raises:
        OutputError: the folder cannot be written, or another process trains in it.
        InputError: it holds something else, or a run of another kind.
    """

    def __init__(self, path: Path | str, kind: str, *, keep: int = 2, is_main: bool = True):
        self.path, self.kind, self._keep, self._is_main = Path(path), kind, keep, is_main
        self.checkpoints = self.path / "checkpoints"
        self._facts = self.path / "run.json"
        self._metrics = self.path / "metrics.jsonl"

    def __enter__(self) -> RunFolder:
        if not self._is_main:
            return self
        if self.path.exists() and not self._facts.exists() and any(self._others()):
            raise InputError(
                f"expected a new folder or one of a run, got {str(self.path)!r}, which holds "
                f"{next(self._others()).name!r} and no run.json; name another one"
            )
        with writing_in(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(self.path / "lock", f"train in {str(self.path)!r}")
            recover(self.path)
            self._remove_what_is_not_whole()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_main:
            self._remove_what_is_not_whole()
            self._lock.release()

    def _remove_what_is_not_whole(self) -> None:
        left = [path for path in self.checkpoints.iterdir() if not _STEP.fullmatch(path.name)]
        for path in [*left, *self.path.glob(f"{_NEW}*")]:
            shutil.rmtree(path, ignore_errors=True)

    def _others(self) -> Iterable[Path]:
        ours = {"lock", "run.json.new", "checkpoints", "tokenizer", "tokenizer.lock"}
        return (path for path in self.path.iterdir() if path.name not in ours)

    def begin(self, facts: Mapping[str, object], allow: Iterable[str] = ()) -> dict[str, object]:
        """Say what the run follows from, or compare that with what it was begun with.

        Args:
            facts: by name; what JSON can hold. Those that begin with ``_`` are told and not
                compared.
            allow: names of facts that may have changed.

        Returns:
            What it was begun with; nothing if it begins now.

        Raises:
            InputError: other facts, or a run of another kind.
        """
        earlier = self.facts()
        if not self._is_main:
            return earlier
        mine = json.loads(json.dumps({"kind": self.kind, **facts}))
        if earlier:
            if earlier.get("kind") != self.kind:
                raise InputError(
                    f"expected a run of fastbert {self.kind} in {str(self.path)!r}, got one of "
                    f"fastbert {earlier.get('kind')}; name another folder"
                )
            allow = set(allow)
            other = [
                f"{name} was {earlier.get(name)!r} and is {mine.get(name)!r}"
                for name in dict.fromkeys([*earlier, *mine])
                if not name.startswith("_")
                and name not in allow
                and earlier.get(name) != mine.get(name)
            ]
            if other:
                raise InputError(
                    f"cannot go on with the run in {str(self.path)!r}: {'; '.join(other)}. Use "
                    "what it was begun with, name another folder, or insist with --allow-change "
                    "NAME"
                )
        write_json(self._facts, mine, indent=2)
        return earlier

    def facts(self) -> dict[str, object]:
        """What the run was begun with; nothing if it was not."""
        return json.loads(self._facts.read_text("utf-8")) if self._facts.exists() else {}

    def latest(self) -> tuple[int, Path] | None:
        """The step of the last checkpoint and its folder."""
        return max(self._steps(), default=None)

    def _steps(self) -> list[tuple[int, Path]]:
        found = ((_STEP.fullmatch(path.name), path) for path in self.checkpoints.iterdir())
        return sorted((int(match[1]), path) for match, path in found if match)

    def new_checkpoint(self) -> Path:
        """Where the next one is written, until `keep_checkpoint`."""
        return self.checkpoints / f"{_NEW}checkpoint"

    def keep_checkpoint(self, written: Path, step: int) -> None:
        """Give a checkpoint that is complete its name; older ones go. The metrics until then are on
        the disk."""
        if self._metrics.exists():
            with self._metrics.open("a", encoding="utf-8") as file:
                to_disk(file)
        publish(written, self.checkpoints / f"step-{step}")
        for _, old in self._steps()[: -self._keep]:
            remove(old)

    def log(self, lines: Iterable[Mapping[str, object]]) -> None:
        """Add lines to the metrics."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def metrics(self) -> list[dict[str, object]]:
        """All lines."""
        if not self._metrics.exists():
            return []
        lines = self._metrics.read_text("utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]  # a last one without its end is half

    def forget_after(self, step: int) -> None:
        """Take back the metrics of steps behind one, which come again."""
        if not self._is_main:
            return
        lines = [line for line in self.metrics() if line["step"] <= step]
        new = self._metrics.with_name("metrics.jsonl.new")
        with new.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            to_disk(file)
        new.replace(self._metrics)

    def new(self, name: str) -> Path:
        """Where a model is written, until `publish`."""
        new = self.path / f"{_NEW}{name}"
        shutil.rmtree(new, ignore_errors=True)
        return new

    def publish(self, name: str) -> None:
        """Give a model that is complete its name, in the place of one that was there."""
        publish(self.path / f"{_NEW}{name}", self.path / name)


@contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Makes a failure to write an `OutputError`."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write in {str(folder)!r}: {error.strerror or error}; what was complete is as "
            "it was, and the same command goes on from there"
        ) from error
