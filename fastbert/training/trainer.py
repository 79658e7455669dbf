"""transformers' Trainer for packed batches, and for runs that may end at any moment.

What Trainer does it does here too: callbacks, accelerate, schedules, clipping. What it cannot do is
added: batches that a sampler of our own makes for every process, checkpoints that are whole or not
there, metrics of every step that are the same whether a run was interrupted or not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..tasks.durable import write_json
from ..tasks.errors import TaskError
from .collating import check_packs
from .cost import memory_used
from .masking import IGNORED
from .run_folder import RunFolder, writing_in
from .sampling import TokenBudgetSampler
from .segments import Drawn, Segments

# Of a step, in metrics.jsonl.
_LOGGED = ("loss", "grad_norm", "learning_rate", "tokens", "masked", "mlm_accuracy", "nsp_accuracy",
           "seconds", "memory")  # fmt: skip

__all__ = ["DrawnBatches", "NotFinite", "PretrainingTrainer"]


class NotFinite(TaskError):
    """The loss is no number any more; the last checkpoint is from before."""


class DrawnBatches(Sampler[list[Drawn]]):
    """The batches of a whole run, epoch after epoch, each of at most ``tokens`` tokens.

    The stream of batches is one for all processes, which take turns: so many steps of so many
    batches are the same on one process and on several.

    Args:
        draw: the examples of an epoch.
        tokens: of a batch at most.
        count: batches of this process.
        seed: of the order.
        rank, world_size: which process this is, of how many.
        probability: share of the tokens to be masked, by the share of the run that is over.

    Attributes:
        done: batches that this process was given before; of these `__iter__` gives empty ones,
            for Trainer to skip.
        starts: where in the stream each epoch that is known by now begins.
    """

    def __init__(
        self,
        draw: Callable[[int], Segments],
        tokens: int,
        count: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        probability: Callable[[float], float] = lambda share: 0.15,
    ):
        self._draw, self._tokens, self._seed = draw, tokens, seed
        self._count, self._rank, self._world_size = count, rank, world_size
        self._probability = probability
        self.done = 0
        self.starts = [0]

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[Drawn]]:
        yield from ([] for _ in range(self.done))
        left = self._count - self.done
        for place, segments, epoch, batch in self._stream(self.done * self._world_size):
            if left == 0:
                return
            if place % self._world_size == self._rank:
                left -= 1
                yield self._drawn(segments, epoch, batch, place)

    def _stream(self, start: int) -> Iterator[tuple[int, Segments, int, list[int]]]:
        """The batches of all processes from one on: place, examples of the epoch, epoch, and which
        of them."""
        epoch = max(e for e, first in enumerate(self.starts) if first <= start)
        while True:
            segments = self._draw(epoch)
            batches = TokenBudgetSampler(
                segments.lengths, self._tokens, seed=self._seed, epoch=epoch, rank=0, world_size=1
            )
            first = self.starts[epoch]
            if epoch + 1 == len(self.starts):
                self.starts.append(first + len(batches))
            skipped = min(max(start - first, 0), len(batches))
            batches.resume(epoch, skipped)
            for place, batch in enumerate(batches, first + skipped):
                yield place, segments, epoch, batch
            epoch += 1

    def _drawn(self, segments: Segments, epoch: int, batch: list[int], place: int) -> list[Drawn]:
        probability = self._probability(place / (self._count * self._world_size))
        return [
            Drawn(
                epoch,
                index,
                tuple(segments.a[index].tolist()),
                tuple(segments.b[index].tolist()),
                int(segments.random[index]),
                probability,
            )
            for index in batch
        ]


class PretrainingTrainer(Trainer):
    """Trains a masked-LM model, with next-sentence prediction or without, on drawn segments.

    Args:
        model: a `fastbert.BertForPreTraining` or `fastbert.BertForMaskedLM`.
        args: of transformers; `run` says where things go.
        dataset: `fastbert.training.SegmentDataset`, by what the samplers draw.
        data_collator: `fastbert.training.PackedCollator` with a masking.
        batches: of the run.
        held_out: of an evaluation, or None.
        run: where checkpoints, metrics and the best model go.
        patience: evaluations without a better loss after which the run ends.
        stop: whether this process has been asked to end; all of them do, behind a checkpoint.
        options: of `transformers.Trainer`.

    Raises:
        TypeError: a model that would let packed sequences attend to each other.
        NotFinite: while training, a loss that is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        dataset: Dataset,
        data_collator: Callable,
        batches: DrawnBatches,
        held_out: DrawnBatches | None,
        run: RunFolder,
        patience: int | None = None,
        stop: Callable[[], bool] = lambda: False,
        **options: Any,
    ):
        check_packs(model)
        held_out_data = None if held_out is None else dataset  # Trainer wants one to evaluate
        super().__init__(model, args, data_collator, dataset, held_out_data, **options)
        self.batches, self.held_out, self.run, self.patience = batches, held_out, run, patience
        self.seconds, self._stop = Seconds(), stop
        self._noted: list[Tensor] = []
        self.stopped = False
        self.add_callback(_EachStep(self))
        if self.is_fsdp_enabled:
            _share_out(model, self.accelerator.state.fsdp_plugin)

    def begin(self) -> None:
        """Count time from now on."""
        self.seconds.begin()
        self._logged = time.perf_counter()

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.batches)

    def _loader(self, batches: DrawnBatches) -> DataLoader:
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
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        relation = outputs.get("seq_relationship_logits")
        counts = [inputs["input_ids"].new_tensor(inputs["input_ids"].numel())]
        counts += [(inputs["labels"] != IGNORED).sum(), outputs["num_correct"]]
        if relation is not None:
            right = relation.argmax(-1) == inputs["next_sentence_label"]
            counts += [right.sum(), counts[0].new_tensor(len(right))]
        self._noted.append(torch.stack(counts))
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
        tokens, masked, right, *pairs = counts
        notes = {"tokens": tokens, "masked": masked, "mlm_accuracy": right / max(masked, 1)}
        if pairs:
            notes["nsp_accuracy"] = pairs[0] / pairs[1]
        return notes

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, accuracy and perplexity on the documents that are held out."""
        if self.held_out is None:
            return {}
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        sums = torch.zeros(6, dtype=torch.float64, device=self.args.device)
        with self.seconds.of("evaluation"), torch.no_grad():
            for inputs in self._loader(self.held_out):
                sums += _scores(model, self._prepare_inputs(inputs)).to(sums)
        model.train(was_training)
        mlm, right, count, nsp, nsp_right, pairs = self.accelerator.reduce(sums).tolist()
        found = {
            "loss": mlm / count + nsp / max(pairs, 1),
            "mlm_loss": mlm / count,
            "perplexity": math.exp(min(mlm / count, 700)),
            "mlm_accuracy": right / count,
        }
        if pairs:
            found |= {"nsp_loss": nsp / pairs, "nsp_accuracy": nsp_right / pairs}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def keep_best(self, loss: float) -> None:
        """Save the model if no evaluation was better; end the run after too many that are not."""
        if self.state.best_metric is None or loss < self.state.best_metric:
            self.state.best_metric = loss
            self.save_to("best")
        if self.patience is not None:
            self.accelerator.wait_for_everyone()  # for the line of this evaluation
            losses = [x["eval_loss"] for x in self.run.metrics() if "eval_loss" in x]
            if len(losses) - 1 - losses.index(min(losses)) >= self.patience:
                self.control.should_training_stop = True

    def save_to(self, name: str, add: Callable[[Path], object] | None = None) -> None:
        """Save the model in the folder of the run; ``add`` puts more beside it."""
        with writing_in(self.run.path):
            self._publish(name, add)

    def _publish(self, name: str, add: Callable[[Path], object] | None) -> None:
        new = self.run.new(name)
        self.accelerator.wait_for_everyone()
        self.save_model(str(new))
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

    def __init__(self, trainer: PretrainingTrainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.begin()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._trainer.seconds.add("model", time.perf_counter() - self._trainer.passed)

    def on_log(self, args, state, control, logs=None, **kwargs):
        state.log_history.clear()  # it would be written with every checkpoint; metrics have it
        line = {"step": state.global_step}
        if "loss" in logs:
            line |= {name: logs[name] for name in _LOGGED if name in logs}
        elif "eval_loss" in logs:
            line |= {name: value for name, value in logs.items() if name.startswith("eval_")}
        else:
            return
        if state.is_world_process_zero:
            self._trainer.run.log([line])
        if not math.isfinite(line.get("loss", 0.0)):
            raise NotFinite(
                f"expected a finite loss, got {line['loss']} in step {state.global_step}; the last "
                "checkpoint is from before. Go on from it with a lower learning rate"
            )

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._trainer.keep_best(metrics["eval_loss"])


def _scores(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Of a batch: summed masked-LM loss, right and all masked tokens; the same of its pairs."""
    outputs = model(**inputs, skip_logits=True)
    masked = (inputs["labels"] != IGNORED).sum()
    relation, pairs = outputs.get("seq_relationship_logits"), torch.zeros(3, device=masked.device)
    loss = outputs.loss.double()
    if relation is not None:
        relation, labels = relation.float(), inputs["next_sentence_label"]
        right = (relation.argmax(-1) == labels).sum()
        pairs = torch.stack([F.cross_entropy(relation, labels, reduction="sum"), right,
                             right.new_tensor(len(labels))])  # fmt: skip
        loss = loss - pairs[0] / len(labels)
    return torch.cat([torch.stack([loss * masked, outputs.num_correct, masked]), pairs.double()])
