"""What can go wrong in a job and is not a bug: each class has the exit code of the command line."""

__all__ = ["InputError", "LoadError", "OutputError", "TaskError"]


class TaskError(Exception):
    """A message of the form: what was expected, what came, what to do."""

    exit_code = 1


class InputError(TaskError):
    """The input cannot be read, or a row of it is bad."""

    exit_code = 3


class LoadError(TaskError):
    """The model cannot be loaded."""

    exit_code = 4


class OutputError(TaskError):
    """The output cannot be written."""

    exit_code = 5
