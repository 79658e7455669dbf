"""``fastbert finetune`` as functions: from tables to a model that is known to be good for them.

`prepare` reads everything and changes nothing; `Finetuning.report` says what the data is like and
how good it is to know nothing; `Finetuning.train` trains, or goes on with what an earlier call has
left, and says how good the best model is.
"""

from __future__ import annotations

import transformers

from ..tasks.errors import InputError
from ..training.run import Processes
from .base import Finetuning
from .embedding import embedding_task
from .heads import HeadFinetuning
from .kinds import task_of
from .request import Request
from .table import Splits, Table, read_table, split_off

__all__ = ["Finetuning", "Request", "prepare"]


def prepare(request: Request) -> Finetuning:
    """Read the tables and make the model.

    Raises:
        InputError: tables without what the task needs, or a setting that cannot be.
        LoadError: a model that cannot be loaded, or with a head for other labels.
    """
    processes = Processes.here(request.device, command="finetune")
    if request.long not in ("cut", "windows"):
        raise InputError(f"expected --long cut or windows, got {request.long!r}")
    train, dev, test = (
        None if path is None else read_table(path, request.cache_dir)
        for path in (request.train, request.dev, request.test)
    )
    given = [table for table in (train, dev, test) if table is not None]
    transformers.set_seed(request.seed)
    if (embedding := embedding_task(train, request.task)) is not None:
        from .embedding_run import EmbeddingFinetuning  # needs sentence-transformers

        for table in given:  # before rows are split off, and have other numbers
            embedding.check(table)
        splits = _splits(request, train, dev, test)
        return EmbeddingFinetuning(request, processes, splits, embedding)
    task = task_of(train, request.task).of(*given)
    for table in given:
        task.check(table)
        task.gold(table)
    return HeadFinetuning(request, processes, _splits(request, train, dev, test), task)


def _splits(request: Request, train: Table, dev: Table | None, test: Table | None) -> Splits:
    if test is None and request.test_share:
        train, test = split_off(train, request.test_share, request.seed)
    if dev is None:
        train, dev = split_off(train, request.dev_share, request.seed + 1)
    return Splits(train, dev, test)
