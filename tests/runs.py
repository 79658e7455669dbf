"""What tests of training runs share: something that happens behind a step, what a run has left."""

import json
from pathlib import Path

import transformers


class At(transformers.TrainerCallback):
    """Does something behind a step, once.

    A signal is raised by this thread: one that is sent to the process may be taken by another one,
    and be noted a step later.
    """

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.do()


def metrics_of(folder: Path) -> list[dict]:
    """Without times and memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "memory")} for line in lines]


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
