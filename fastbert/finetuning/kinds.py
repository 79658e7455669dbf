"""Which tasks there are: by name, by the columns of a table, by the configuration of a model."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..tasks.errors import InputError
from .answering import Answering
from .multiple_choice import MultipleChoice
from .sequences import Classification, MultiLabel, Regression
from .table import Table
from .tagging import Tagging
from .tasks import Task

__all__ = ["TASKS", "task_from_config", "task_of"]

TASKS: dict[str, type[Task]] = {
    cls.name: cls
    for cls in (Classification, MultiLabel, Regression, Tagging, Answering, MultipleChoice)
}


def task_of(table: Table, asked: str | None) -> type[Task]:
    """The task that the columns of a table say, or that is asked for.

    Raises:
        InputError: an unknown task, or columns that say none.
    """
    if asked is not None:
        if asked not in TASKS:
            raise InputError(
                f"expected a --task of {', '.join([*TASKS, 'embeddings'])}, got {asked!r}"
            )
        return TASKS[asked]
    columns = set(table.columns)
    if {"tokens", "tags"} <= columns or {"text", "spans"} <= columns:
        return Tagging
    if {"question", "context", "answers"} <= columns:
        return Answering
    if {"context", "choices"} <= columns:
        return MultipleChoice
    texts = "text" in columns or {"text_a", "text_b"} <= columns
    if texts and "labels" in columns:
        return MultiLabel
    if texts and "score" in columns:
        return Regression
    if texts and "label" in columns:
        return Regression if isinstance(table.column("label")[0], float) else Classification
    raise InputError(
        f"expected columns of a task in {table.name!r}: text (or text_a and text_b) with label, "
        "labels or score, tokens with tags, text with spans, question, context and answers, "
        "context and choices with label, or query and passage; got "
        f"{', '.join(table.columns)}"
    )


def task_from_config(config: PreTrainedConfig) -> Task:
    """The task of a checkpoint with a head of its own, by what its configuration says.

    Raises:
        InputError: a head of another kind, or none.
    """
    architecture = (config.architectures or ["none"])[0]
    head = next((cls.head for cls in TASKS.values() if architecture.endswith(cls.head)), None)
    labels = [config.id2label[i] for i in range(config.num_labels)]
    if head == Tagging.head:
        return Tagging(labels)
    if head == Answering.head:
        answering = Answering([])
        answering.threshold = getattr(config, "no_answer_threshold", answering.threshold)
        return answering
    if head == MultipleChoice.head:
        return MultipleChoice([])
    if head != Task.head:
        heads = " or ".join(dict.fromkeys(cls.head for cls in TASKS.values()))
        raise InputError(
            f"expected a checkpoint whose class ends in {heads}, got a {architecture}; fastbert "
            "finetune trains one, fastbert embed is for embeddings"
        )
    if config.problem_type == "multi_label_classification":
        return MultiLabel(labels)
    if config.problem_type == "regression" or config.num_labels == 1:
        return Regression([])
    return Classification(labels)
