"""How a run goes, for who watches it: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

__all__ = ["Shown"]

_LINES = 20  # of a run without a terminal, about
_RIGHT = {"mlm_accuracy": "masked right", "nsp_accuracy": "pairs right", "accuracy": "right"}


class Shown(TrainerCallback):
    """Shows loss, accuracy, learning rate, gradient norm, speed and time left.

    Args:
        console: where.
        title: of the bar.
        evaluated: the metric of evaluations that is shown, and what it is called.
        share_of_rate: from tokens a second to the share of the machine's matrix rate, if known.
    """

    def __init__(
        self,
        console: Console,
        title: str,
        evaluated: tuple[str, str],
        share_of_rate: Callable[[float], float | None] = lambda speed: None,
    ):
        self._console, (self._metric, self._called) = console, evaluated
        self._share_of_rate = share_of_rate
        self._columns = TextColumn(title), BarColumn(), MofNCompleteColumn()
        self._evaluated, self._tokens = "", 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._start, self._first = time.perf_counter(), state.global_step
        self._every = -(-state.max_steps // _LINES)
        self._bar = Progress(
            *self._columns, TextColumn("{task.fields[text]}"), TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal or not state.is_world_process_zero,
        )  # fmt: skip
        self._bar.start()
        self._task = self._bar.add_task("", total=state.max_steps, completed=self._first, text="")
        if self._first and state.is_world_process_zero:
            self._console.print(f"going on behind step {self._first}")

    def on_train_end(self, args, state, control, **kwargs):
        self._bar.stop()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._evaluated = f" | {self._called} {metrics[f'eval_{self._metric}']:.3f}"

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not state.is_world_process_zero:
            return
        step = state.global_step
        self._tokens += logs["tokens"]
        seconds = time.perf_counter() - self._start
        share, speed = (step - self._first) / seconds, self._tokens / seconds
        right = "".join(f" | {called} {logs[name]:.1%}" for name, called in _RIGHT.items()
                        if name in logs)  # fmt: skip
        matrix = self._share_of_rate(speed)
        of_machine = "" if matrix is None else f", {matrix:.0%} of the matrix rate"
        text = (
            f"loss {logs['loss']:.3f}{right} | norm {logs.get('grad_norm', 0.0):.2f} "
            f"| rate {logs['learning_rate']:.1e} | {speed:,.0f} tokens/s{of_machine} "
            f"| {logs['memory'] / 2**30:.1f} GB{self._evaluated}"
        )
        self._bar.update(self._task, completed=step, text=text)
        if self._bar.disable and (step % self._every == 0 or step == state.max_steps):
            left = (state.max_steps - step) / share
            self._console.print(
                f"step {step}/{state.max_steps} | {text} | {left:,.0f} s left",
                soft_wrap=True, highlight=False,
            )  # fmt: skip
