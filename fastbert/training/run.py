"""What every run has in common: its processes, its end by a signal, how it goes on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from transformers import PrinterCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from ..tasks.errors import InputError
from ..tasks.loading import quiet, resolve_device
from .run_folder import RunFolder
from .trainer import InRun

__all__ = ["Processes", "arguments_for", "train_in"]

_Verdict = TypeVar("_Verdict")


class Processes(NamedTuple):
    """What torchrun says of the processes that train together.

    Attributes:
        is_main: whether this is the one that writes and speaks.
        count: how many there are.
        device: of this one.
        bf16: whether products are made in bf16.
        fsdp: whether the model is shared out among them.
    """

    is_main: bool
    count: int
    device: torch.device
    bf16: bool
    fsdp: bool

    @classmethod
    def here(cls, device: str, *, fsdp: bool = False, command: str) -> Processes:
        """Those of this run.

        Raises:
            LoadError: a device that is not here.
            InputError: ``fsdp`` for one process, or without GPUs.
        """
        count, found = int(os.environ.get("WORLD_SIZE", "1")), resolve_device(device)
        if fsdp and not (count > 1 and _shards_on(found)):
            raise InputError(
                "expected several processes with a GPU each to share a model out to with --fsdp, "
                f"got {count} on {found.type}; start them by torchrun --nproc-per-node N "
                f"-m fastbert {command} ..., or leave it out"
            )
        if found.type == "cuda" and "LOCAL_RANK" in os.environ:
            found = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        bf16 = found.type == "cuda" and torch.cuda.is_bf16_supported()
        return cls(os.environ.get("RANK", "0") == "0", count, found, bf16, fsdp)


def _shards_on(device: torch.device) -> bool:
    """Whether accelerate does; elsewhere it would make copies and not say so."""
    return device.type != "cpu"


def arguments_for(
    run: RunFolder,
    processes: Processes,
    *,
    evaluate_every: int | None,
    kind: type[TrainingArguments] = TrainingArguments,
    **options: object,
) -> TrainingArguments:
    """What an `InRun` needs of transformers' arguments in every run.

    Args:
        kind: of arguments.
        evaluate_every: steps between evaluations, or None for none.
        options: the other ones.
    """
    return kind(
        str(run.checkpoints / ".new"),
        lr_scheduler_type="linear",
        bf16=processes.bf16,
        fsdp=processes.fsdp or None,
        fsdp_config={"auto_wrap_policy": "NO_WRAP"} if processes.fsdp else None,
        use_cpu=processes.device.type == "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="no" if evaluate_every is None else "steps",
        eval_steps=evaluate_every,
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        **options,
    )


def train_in(
    run: RunFolder,
    processes: Processes,
    facts: Mapping[str, object],
    *,
    allow: Iterable[str],
    make_trainer: Callable[[RunFolder, Callable[[], bool]], InRun],
    verdict: Callable[[RunFolder, float | None], _Verdict],
    describe: Callable[[Path, _Verdict], object],
) -> _Verdict:
    """Train in a folder, from the start or from the last checkpoint in it.

    Args:
        facts: what the run follows from, ``steps`` among them.
        allow: facts that may have changed since it was begun.
        make_trainer: from the folder, and from what tells whether to stop.
        verdict: from the folder, and from the share of time that the model did not take, which is
            None where nothing was left to be done.
        describe: puts a card beside the last model.

    Raises:
        InputError, OutputError: as `RunFolder`.
        NotFinite: the loss is not finite any more.
        SystemExit: a signal came, and a checkpoint was written: 128 and its number.
    """
    with run, _stopping() as stop, quiet():
        begun = run.begin(facts, allow)
        trainer = make_trainer(run, lambda: stop.signal is not None)
        trainer.remove_callback(PrinterCallback)
        trainer.accelerator.wait_for_everyone()  # behind what the first one does to the folder
        if begun.get("steps") == facts["steps"] and (run.path / "final").exists():
            return verdict(run, None)
        found = run.latest()
        if processes.is_main and find_spec("tensorboard"):
            trainer.add_callback(_tensorboard(run, found[0] if found else 0))
        if found is not None:
            trainer.go_on(*found)
        else:
            run.forget_after(-1)  # of a start that came to no checkpoint
            trainer.evaluate()
        trainer.train(resume_from_checkpoint=str(found[1]) if found else None)
        if trainer.stopped:
            raise SystemExit(128 + (stop.signal or signal.SIGTERM))
        reached = verdict(run, trainer.seconds.overhead)
        trainer.save_to("final", lambda folder: describe(folder, reached))
        return reached


def _tensorboard(run: RunFolder, step: int) -> TensorBoardCallback:
    """Writes what is logged into the folder of the run, in place of what is there behind a step."""
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardCallback(SummaryWriter(str(run.path / "tensorboard"), purge_step=step + 1))


class _Stop:
    """Which signal came, if one did."""

    signal: int | None = None


@contextmanager
def _stopping() -> Iterator[_Stop]:
    """SIGINT and SIGTERM are noted, the second one acts as ever."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {}

    def note(number, frame):
        stop.signal = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
