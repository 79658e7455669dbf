"""What the host does for a forward pass or a training step: launches, waits and microseconds.

A GPU is done with a short batch before Python has launched it, so the host's part is a number of
its own, and one that needs no GPU: the model runs over `fastbert.kernels._stub_driver`, where
kernels and products are launched into nothing. Layers are narrow, since what a size costs, it costs
the GPU. What torch computes beside them does run, on the CPU, and is in the time.
"""

from __future__ import annotations

import time
import timeit
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastbert
from fastbert.benchmarks.encoders import config_of
from fastbert.benchmarks.results import machine_facts

from ..kernels import _stub_driver
from ..ops import backend, embedding

__all__ = ["KINDS", "HostCost", "Part", "measure"]

KINDS = ("forward", "training")
DROPOUT = 0.1  # in training
_FEW_LAYERS = 2
_HEADS, _WORDS = 2, 1024
# Functions inside a call: their module, their name, what they are, how deep inside another.
_PARTS = {
    "forward": (
        ("families.model", "examine", "what is in the model", 0),
        ("families.model", "plan_of", "its weights, as they were read", 0),
        ("families.model", "make_batch", "packed batch", 0),
        ("families.model", "embed_rows", "embeddings", 0),
        ("families.model", "encode_layers", "layers", 0),
        ("ops.inference.LayerLaunches", "attend", "attention", 1),
        ("ops.inference.LayerLaunches", "linear", "product, activation", 1),
        ("ops.inference.LayerLaunches", "linear_add_norm", "product, residual, norm", 1),
    ),
    "training": (
        ("families.model", "examine", "what is in the model", 0),
        ("families.model", "make_batch", "packed batch", 0),
        ("families.model", "embed_rows", "embeddings", 0),
        ("families.model", "train_layers", "layers, forward", 0),
        ("workbench.host", "_backward", "backward", 0),
    ),
}
_LAUNCHERS = tuple(
    (f"kernels.{name}", "launch", "in all this, launches looked up by value", 0)
    for name in (
        "attention", "attention_bwd", "cross_entropy", "embedding", "layernorm", "linear", "_sums",
    )
)  # fmt: skip
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
# Operations of torch that launch nothing, or nothing but what they call.
_NO_LAUNCH = frozenset((
    "_local_scalar_dense", "_reshape_alias", "_to_copy", "_unsafe_view", "alias", "as_strided",
    "as_strided_", "chunk", "contiguous", "detach", "detach_", "dropout", "empty", "empty_like",
    "empty_strided", "expand", "expand_as", "flatten", "is_nonzero", "item", "lift_fresh", "linear",
    "matmul", "narrow", "new_empty", "numpy_T", "permute", "promote_types", "reshape", "resize_",
    "resolve_conj", "resolve_neg", "result_type", "select", "set_", "slice", "split",
    "split_with_sizes", "squeeze", "t", "to", "transpose", "unbind", "unflatten", "unsqueeze",
    "view", "view_as",
))  # fmt: skip
# What makes the host wait for the device: methods that read values, and operations whose result is
# as large as values say.
_READS = ("__bool__", "__float__", "__index__", "__int__", "cpu", "item", "numpy", "tolist")
_SIZED_BY_VALUES = ("aten::masked_select", "aten::nonzero", "aten::_unique2")


class Part(NamedTuple):
    """A function inside a call: how often it runs, and its seconds, all together."""

    name: str
    depth: int
    calls: int
    seconds: float


@dataclass(frozen=True)
class HostCost:
    """What one call costs the host.

    Attributes:
        what: the call in words.
        layers: of the model.
        seconds, layer_seconds: of a call; of that, what each layer adds.
        launches, layer_launches: of each Triton kernel; what each layer adds.
        products, layer_products: of matrices, the library's.
        product_seconds: of one of their stand-ins.
        operations, layer_operations: others of torch that launch something.
        waits: how often the host reads from the device, which then has to be done.
        parts: where the time goes, by clocks that add a little to it.
        machine: what it ran on.
    """

    what: str
    layers: int
    seconds: float
    layer_seconds: float
    launches: dict[str, int]
    layer_launches: dict[str, int]
    products: int
    layer_products: int
    product_seconds: float
    operations: dict[str, int]
    layer_operations: dict[str, int]
    waits: int
    parts: list[Part]
    machine: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "parts": [part._asdict() for part in self.parts]}


def measure(
    kind: str = "forward",
    *,
    model: str = "base",
    layers: int | None = None,
    batch: int = 1,
    length: int = 128,
    padded: bool = False,
    autocast: bool = False,
    arch: int = 90,
    calls: int = 200,
) -> HostCost:
    """Count and time in this process, which can compute nothing afterwards.

    Args:
        kind: ``"forward"``, in inference, or ``"training"``: forward and backward of a masked
            language model with dropout, without the optimizer.
        model: one of `fastbert.benchmarks.shapes.MODELS`, for the number of its layers and the size
            of its heads; in bf16.
        layers: if it shall have another number of them; at least 3, since what a layer adds is told
            from a model with 2.
        batch, length: of the input.
        padded: every other sequence is half as long, and a mask says so.
        autocast: weights in fp32, bf16 by autocast.
        arch: which kernels are compiled for, such as 90.
        calls: how many are timed.

    Raises:
        ValueError: an unknown kind, or fewer than 3 layers.
        RuntimeError: what the stub driver needs is missing.
    """
    if kind not in KINDS:
        raise ValueError(f"host: expected a kind of {', '.join(KINDS)}, got {kind!r}")
    config = config_of(model)
    count = config.num_hidden_layers if layers is None else layers
    if count <= _FEW_LAYERS:
        raise ValueError(f"host: expected more than {_FEW_LAYERS} layers, got {count}")
    size = _HEADS * config.hidden_size // config.num_attention_heads
    config.update({
        "hidden_size": size, "num_attention_heads": _HEADS, "intermediate_size": 4 * size,
        "vocab_size": _WORDS,
    })  # fmt: skip
    if kind == "training":
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = DROPOUT
    launches = _stub_driver.install(arch)
    backend._known["cpu", None] = None  # CPU tensors have the kernels,
    embedding.check_range = lambda name, ids, rows: None  # without a CPU's checks
    found = []
    for number in (_FEW_LAYERS, count):
        config.num_hidden_layers = number
        call = _call(kind, config, batch, length, padded, autocast)
        found.append((_count(call, launches), _time(call, calls)))
    (few, few_seconds), (all_of_it, seconds) = found
    more = count - _FEW_LAYERS

    def each(whole: Counter[str], less: Counter[str]) -> dict[str, int]:
        return {name: (n - less[name]) // more for name, n in whole.items() if n > less[name]}

    words = [f"{kind}, {model}, {count} layers, B{batch} S{length}"]
    words += ["every other sequence half as long"] * padded + ["autocast"] * autocast
    return HostCost(
        ", ".join(words),
        count,
        seconds,
        (seconds - few_seconds) / more,
        dict(all_of_it.launches),
        each(all_of_it.launches, few.launches),
        all_of_it.products,
        (all_of_it.products - few.products) // more,
        _time(partial(F.linear, *torch.empty(2, 8, size)), calls),
        dict(all_of_it.operations),
        each(all_of_it.operations, few.operations),
        all_of_it.waits,
        _parts(kind, call, calls),
        machine_facts("cpu"),
    )


def _call(
    kind: str, config: Any, batch: int, length: int, padded: bool, autocast: bool
) -> Callable[[], None]:
    """One call of a model that has been called before."""
    made = fastbert.BertModel if kind == "forward" else fastbert.BertForMaskedLM
    options = {"add_pooling_layer": False} if kind == "forward" else {}
    dtype = torch.float32 if autocast else torch.bfloat16
    model = made._from_config(config, dtype=dtype, **options).train(kind == "training")
    ids = torch.randint(5, _WORDS, (batch, length))
    real = torch.ones_like(ids)
    real[1::2, length - length // 2 :] = 0
    inputs = {"input_ids": ids, **({"attention_mask": real} if padded else {})}
    if kind == "training":
        chosen = torch.arange(ids.numel()).view_as(ids) % 7 == 0
        inputs["labels"] = ids.masked_fill(~chosen | (padded & (real == 0)), -100)

    parameters = list(model.parameters())

    def call() -> None:
        cast = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        if kind == "forward":
            with torch.inference_mode(), cast:
                model(**inputs)
            return
        with cast:
            loss = model(**inputs, skip_logits=True).loss
        _backward(loss)
        for parameter in parameters:
            parameter.grad = None

    for _ in range(3):
        call()
    return call


def _backward(loss: Tensor) -> None:
    loss.backward()


# ---- counting ----


class _Counts(NamedTuple):
    """Of one call, as `HostCost` has them."""

    launches: Counter[str]
    products: int
    operations: Counter[str]
    waits: int


def _count(call: Callable[[], None], launches: _stub_driver.Launches) -> _Counts:
    before = launches.counted()
    clocks = [_Clock(name, getattr(Tensor, name)) for name in _READS]
    with ExitStack() as stack:
        for clock in clocks:
            stack.enter_context(_in_place(Tensor, clock.name, clock))
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            call()
    events = trace.events()
    operations = Counter(_launching(event for event in events if event.cpu_parent is None))
    products = sum(operations.pop(name, 0) for name in _PRODUCTS)
    waits = sum(clock.calls for clock in clocks)
    waits += sum(event.name in _SIZED_BY_VALUES for event in events)
    return _Counts(launches.counted() - before, products, operations, waits)


def _launching(events: Iterable[Any]) -> Iterator[str]:
    """Names of torch's operations that launch something, and not of those that they call."""
    for event in events:
        namespace, _, name = event.name.partition("::")
        if namespace == "aten" and name not in _NO_LAUNCH:
            yield name
        else:
            yield from _launching(event.cpu_children)


# ---- timing ----


def _time(call: Callable[[], Any], calls: int) -> float:
    """Seconds of a call: the least, as Python's `timeit` advises, since what else runs adds."""
    return min(timeit.repeat(call, number=1, repeat=calls))


class _Clock:
    """A function or a method with a clock around it."""

    def __init__(self, name: str, function: Callable, depth: int = 0):
        self.name, self.depth, self.calls, self.seconds = name, depth, 0, 0.0
        self._function = function

    def __call__(self, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._function(*args, **options)
        finally:
            self.seconds += time.perf_counter() - start
            self.calls += 1

    def __get__(self, owner: Any, cls: type) -> Any:
        return self if owner is None else partial(self, owner)


@contextmanager
def _in_place(owner: Any, name: str, clock: _Clock) -> Iterator[None]:
    real = getattr(owner, name)
    setattr(owner, name, clock)
    try:
        yield
    finally:
        setattr(owner, name, real)


def _parts(kind: str, call: Callable[[], None], calls: int) -> list[Part]:
    clocks, samples = [], []
    with ExitStack() as stack:
        for module, name, words, depth in (*_PARTS[kind], *_LAUNCHERS):
            owner = resolve_name(f"fastbert.{module}")
            clocks.append(_Clock(words, getattr(owner, name), depth))
            stack.enter_context(_in_place(owner, name, clocks[-1]))
        for _ in range(calls):
            before = [(clock.calls, clock.seconds) for clock in clocks]
            call()
            samples.append(
                [(c.calls - n, c.seconds - s) for c, (n, s) in zip(clocks, before, strict=True)]
            )
    found: dict[str, Part] = {}
    for clock, of_calls in zip(clocks, zip(*samples, strict=True), strict=True):
        seconds = min(seconds for _, seconds in of_calls)
        _, _, count, sum_of_others = found.get(clock.name, (None, 0, 0, 0.0))
        found[clock.name] = Part(
            clock.name, clock.depth, of_calls[0][0] + count, seconds + sum_of_others
        )
    return [part for part in found.values() if part.calls]
