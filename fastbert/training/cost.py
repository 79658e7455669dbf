"""What training costs on this machine: a copy of the model is trained for a moment, and timed."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from typing import NamedTuple

import psutil
import torch
from torch import Tensor
from transformers import BertConfig, PreTrainedModel

from ..benchmarks.kept import kept_for_backward
from ..benchmarks.limits import matrix_rate
from ..benchmarks.timing import clock_for
from ..kernels._cost import encoder_cost, linear_cost
from .masking import IGNORED

__all__ = ["Cost", "flops_of", "memory_used", "try_out"]

_SECONDS = 20.0  # of a trial, about


class Cost(NamedTuple):
    """What a trial has found, of one process.

    Attributes:
        tokens_per_second: real ones, through forward, backward and the optimiser.
        flops_per_token: floating-point operations that they take.
        matrix_rate: of one large product, in such operations a second; None where nothing is timed.
        state_bytes: of parameters, their gradients and the optimiser.
        kept_bytes: that the first pass kept for backward.
    """

    tokens_per_second: float
    flops_per_token: float
    matrix_rate: float | None
    state_bytes: int
    kept_bytes: int


def try_out(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    device: torch.device,
    *,
    bf16: bool = False,
) -> Cost:
    """Train a copy of a masked-LM model on packed batches, at a learning rate of 0.

    Random numbers that training will draw stay what they are.
    """
    model = copy.deepcopy(model).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    seen, flops, taken = [], [], []
    with torch.random.fork_rng():
        dtype = torch.bfloat16 if bf16 else torch.float32
        rate = matrix_rate(clock_for(device.type), device.type, dtype, seconds=1.0)
        for batch in batches:
            lengths = batch["cu_seq_lens_q"].diff().tolist()
            masked = int((batch["labels"] != IGNORED).sum())
            seen.append(batch["input_ids"].numel())
            flops.append(flops_of(model.config, lengths, masked))
            start = time.perf_counter()
            batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
            if not taken:  # the first one prepares much, and counting is not for nothing
                with kept_for_backward(model) as kept:
                    loss = _loss(model, batch, device, bf16)
            else:
                loss = _loss(model, batch, device, bf16)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - start)
            if sum(taken) > _SECONDS:
                break
    later = slice(1 if len(taken) > 1 else 0, None)
    return Cost(
        tokens_per_second=sum(seen[later]) / sum(taken[later]),
        flops_per_token=sum(flops) / sum(seen),
        matrix_rate=None if rate is None else rate * 1e12,
        state_bytes=sum(4 * p.numel() * p.itemsize for p in model.parameters()),
        kept_bytes=kept.bytes,
    )


def _loss(
    model: PreTrainedModel, batch: dict[str, Tensor], device: torch.device, bf16: bool
) -> Tensor:
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return model(**batch).loss


def flops_of(config: BertConfig, lengths: list[int], masked: int) -> float:
    """Floating-point operations of a forward and backward pass of a masked-LM model, its products
    alone: of the layers over real tokens, of the head over masked ones. Backward has twice those of
    forward."""
    encoder = encoder_cost(
        lengths,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        itemsize=1,
    )
    width = config.hidden_size
    head = linear_cost(masked, width, width, 1) + linear_cost(masked, config.vocab_size, width, 1)
    return 3 * (encoder + head).flops


def memory_used(device: torch.device) -> int:
    """Bytes: on a GPU the most that torch has had at a time, elsewhere what the process has now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
