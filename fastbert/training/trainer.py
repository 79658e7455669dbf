"""transformers' Trainer for runs that may end at any moment, and for packed batches.

What Trainer does it does here too: callbacks, accelerate, schedules, clipping. What it cannot do is
added: batches that a sampler of our own makes for every process, checkpoints that are whole or not
there, metrics of every step that are the same whether a run was interrupted or not.
"""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..tasks.durable import write_json
from ..tasks.errors import TaskError
from .batches import BatchStream
from .collating import check_packs
from .cost import memory_used
from .run_folder import RunFolder, writing_in

_TRAINERS = ("epoch", "num_input_tokens_seen")  # which a stream of batches has no use for

__all__ = ["InRun", "NotFinite", "RunTrainer"]


class NotFinite(TaskError):
    """The loss is no number any more; the last checkpoint is from before."""


class InRun(ABC):
    """What a Trainer does in a folder of a run, on a stream of batches; stands before a kind of
    `transformers.Trainer` among the bases of a class, whose constructor calls `enter`.

    Attributes:
        best, greater_is_better: the metric that says which model is kept as the best.

    Raises:
        NotFinite: while training, a loss that is not finite.
    """

    best, greater_is_better = "loss", False

    def enter(
        self,
        run: RunFolder,
        batches: BatchStream,
        *,
        evaluates: bool,
        patience: int | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Become the Trainer of a run.

        Args:
            run: where checkpoints, metrics and the best model go.
            batches: of the run.
            evaluates: whether `measure` has anything to measure by.
            patience: evaluations without a better one after which the run ends.
            stop: whether this process has been asked to end; all of them do, behind a checkpoint.
        """
        self.batches, self.evaluates, self.run, self.patience = batches, evaluates, run, patience
        self.seconds, self._stop = Seconds(), stop
        self._noted: list[Tensor] = []
        self.stopped = False
        self.add_callback(_EachStep(self))

    @abstractmethod
    def tokens_of(self, inputs: dict[str, Any]) -> int | Tensor:
        """How many real tokens a batch has."""

    @abstractmethod
    def count(self, inputs: dict[str, Any], outputs: Any) -> list[Tensor]:
        """What of a batch is to be told, int64 numbers that can be added up."""

    @abstractmethod
    def told(self, counts: list[int]) -> dict[str, float]:
        """What the sums of `count` over a step come to, for its line of metrics."""

    @abstractmethod
    def measure(self, model: nn.Module) -> dict[str, float]:
        """An evaluation: metrics of all processes, ``loss`` and `best` among them."""

    def begin(self) -> None:
        """Count time from now on."""
        self.seconds.begin()
        self._logged = time.perf_counter()

    def get_train_dataloader(self) -> DataLoader:
        return self.loader(self.batches)

    def loader(self, batches: BatchStream) -> DataLoader:
        """Of the batches of this process."""
        # Not accelerator.prepare's: it would share batches out that are shared out already.
        return DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.device.type == "cuda",
            # Or making workers would take a number from the one that dropout uses.
            generator=torch.Generator().manual_seed(self.args.seed),
        )

    def get_batch_samples(self, *args, **kwargs):
        with self.seconds.of("data"):
            return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args, **kwargs) -> Tensor:
        with self.seconds.of("model"):
            loss = super().training_step(*args, **kwargs)
        self.passed = time.perf_counter()  # clipping and the optimiser come next, or another pass
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        # A copy: with compute_loss_func it takes the labels out.
        loss, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
        tokens = torch.as_tensor(self.tokens_of(inputs), device=loss.device)
        self._noted.append(torch.stack([tokens, *self.count(inputs, outputs)]))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:  # of a step: what else is known of it, for all who look
            logs |= self._notes()
            now = time.perf_counter()
            logs |= {"seconds": now - self._logged, "memory": memory_used(self.args.device)}
            self._logged = now
        super().log(logs, *args, **kwargs)

    def _notes(self) -> dict[str, float]:
        """What was counted since the last time, of all processes."""
        counts = torch.stack(self._noted).sum(0)
        self._noted.clear()
        counts = torch.cat([counts, counts.new_tensor([self._stop()])])
        *counts, stopped = self.accelerator.reduce(counts).tolist()
        self.stopped = stopped > 0  # in the same step for all
        if self.stopped:
            self.control.should_save = self.control.should_training_stop = True
        return {"tokens": counts[0], **self.told(counts[1:])}

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """What `measure` finds now."""
        if not self.evaluates:
            return {}
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        with self.seconds.of("evaluation"), torch.no_grad():
            found = self.measure(model)
        model.train(was_training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def keep_best(self) -> None:
        """Save the model if no evaluation was better than the last one; end the run after too many
        that are not."""
        self.accelerator.wait_for_everyone()  # for the line of the last one
        sign = 1 if self.greater_is_better else -1
        name = f"eval_{self.best}"
        values = [
            (sign * line[name], -line["eval_loss"])  # of two equal ones the surer
            for line in self.run.metrics()
            if name in line
        ]
        since = len(values) - 1 - values.index(max(values))
        if since == 0:
            self.save_to("best")
        if self.patience is not None and since >= self.patience:
            self.control.should_training_stop = True

    def save_whole(self, folder: str) -> None:
        """Write the model for others, as transformers saves it."""
        self.save_model(folder)

    def save_to(self, name: str, add: Callable[[Path], object] | None = None) -> None:
        """Save the model in the folder of the run; ``add`` puts more beside it."""
        with writing_in(self.run.path):
            self._publish(name, add)

    def _publish(self, name: str, add: Callable[[Path], object] | None) -> None:
        new = self.run.new(name)
        self.accelerator.wait_for_everyone()
        self.save_whole(str(new))
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            (new / "training_args.bin").unlink(missing_ok=True)  # a pickle, of no use to users
            if add is not None:
                add(new)
            self.run.publish(name)
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model, trial) -> None:
        with self.seconds.of("checkpoint"), writing_in(self.run.path):
            self._save_whole(model, trial)

    def _save_whole(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)  # into args.output_dir, which is nobody's yet
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            step = self.state.global_step
            written = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            write_json(written / "batches.json", self.batches.starts)
            self.run.keep_checkpoint(written, step)
        self.accelerator.wait_for_everyone()

    def go_on(self, step: int, checkpoint: Path) -> None:
        """Let the next `train` go on behind a checkpoint: ``train(str(checkpoint))``."""
        self.batches.done = step * self.args.gradient_accumulation_steps
        self.batches.starts = json.loads((checkpoint / "batches.json").read_text("utf-8"))
        self.run.forget_after(step)


class RunTrainer(InRun, Trainer):
    """Trains one of fastbert's classes on packed batches.

    Args:
        model: one of fastbert's classes.
        args: of transformers.
        dataset: gives examples, by what ``batches`` know them by.
        data_collator: a `fastbert.training.PackedCollator`.
        batches, evaluates, run, patience, stop: as `InRun.enter`.
        options: of `transformers.Trainer`.

    Raises:
        TypeError: a model that would let packed sequences attend to each other.
        NotFinite: as `InRun`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        dataset: Dataset,
        data_collator: Callable,
        batches: BatchStream,
        evaluates: bool,
        run: RunFolder,
        patience: int | None = None,
        stop: Callable[[], bool] = lambda: False,
        **options: Any,
    ):
        check_packs(model)
        held_out = dataset if evaluates else None  # Trainer wants one
        super().__init__(model, args, data_collator, dataset, held_out, **options)
        self.enter(run, batches, evaluates=evaluates, patience=patience, stop=stop)
        if self.is_fsdp_enabled:
            _share_out(model, self.accelerator.state.fsdp_plugin)

    def tokens_of(self, inputs: dict[str, Any]) -> int:
        return inputs["input_ids"].numel()


def _share_out(model: nn.Module, plugin: FullyShardedDataParallelPlugin) -> None:
    """A unit of FSDP2 for each layer and one for the rest, whose weights are used outside of their
    modules too; accelerate, which would make more of them, leaves a model alone that has them."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options = {
        "reshard_after_forward": plugin.reshard_after_forward,
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
    }
    for layer in model.base_model.encoder.layer:
        fully_shard(layer, **options)
    fully_shard(model, **options)


class Seconds:
    """Where the time of a run goes, on the host."""

    def __init__(self):
        self.spent: dict[str, float] = {}
        self.begin()

    def begin(self) -> None:
        """Count from now on."""
        self.spent.clear()
        self._start = time.perf_counter()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        self.spent[name] = self.spent.get(name, 0.0) + seconds

    @property
    def overhead(self) -> float | None:
        """Share of the time that training steps did not take, evaluations and checkpoints left out;
        None before the first step."""
        if "model" not in self.spent:
            return None
        apart = self.spent.get("evaluation", 0.0) + self.spent.get("checkpoint", 0.0)
        return 1 - self.spent["model"] / (time.perf_counter() - self._start - apart)


class _EachStep(TrainerCallback):
    """Writes what Trainer says of each step, and refuses to go on without a finite loss."""

    def __init__(self, trainer: InRun):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.begin()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._trainer.seconds.add("model", time.perf_counter() - self._trainer.passed)

    def on_log(self, args, state, control, logs=None, **kwargs):
        state.log_history.clear()  # it would be written with every checkpoint; metrics have it
        line = {"step": state.global_step}
        if "loss" in logs:
            line |= {name: value for name, value in logs.items() if name not in _TRAINERS}
        else:
            line |= {name: value for name, value in logs.items() if name.startswith("eval_")}
        if len(line) == 1:  # what Trainer says of the whole
            return
        if state.is_world_process_zero:
            self._trainer.run.log([line])
        if not math.isfinite(line.get("loss", 0.0)):
            raise NotFinite(
                f"expected a finite loss, got {line['loss']} in step {state.global_step}; the last "
                "checkpoint is from before. Go on from it with a lower learning rate"
            )

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._trainer.keep_best()
