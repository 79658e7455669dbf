"""One encoder in every library: the same random weights, as each wants them, and how to call it.

`Encoders` makes each form once, when it is asked for; `providers_of` gives the callables that are
timed, from a dict of ids and mask to the last hidden state ``[B, S, E]``.
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

import numpy
import torch
import transformers
from torch import Tensor, nn

import fastbert

from .shapes import MODELS
from .workload import OURS, Unavailable

__all__ = [
    "BASELINE", "COMPILED", "CTRANSLATE2", "EAGER", "FREEZING", "INFERENCE", "OPENVINO", "ORT",
    "OWN_FROZEN", "OWN_GRAPHS", "OWN_PADDED", "TORCH_ENCODER",
    "Encoders", "config_of", "encoders_of", "providers_of",
]  # fmt: skip

BASELINE = "transformers sdpa"
EAGER, COMPILED = "transformers eager", "torch.compile"
TORCH_ENCODER = "nn.TransformerEncoder"
OWN_PADDED, OWN_GRAPHS = "fastbert, padded", "fastbert, CUDA graphs"
OWN_FROZEN = "fastbert, frozen"
# What lives on the promise that weights stay: peers of ours frozen.
FREEZING = "torch.compile, freezing"
ORT, OPENVINO, CTRANSLATE2 = "ONNX Runtime", "OpenVINO", "CTranslate2"
INFERENCE = (
    OURS, OWN_FROZEN, OWN_GRAPHS, BASELINE, EAGER, COMPILED, FREEZING, TORCH_ENCODER, OWN_PADDED,
    ORT, OPENVINO, CTRANSLATE2,
)  # fmt: skip
Inputs = dict[str, Tensor]


def config_of(size: str) -> transformers.BertConfig:
    """A model of `shapes.MODELS` without dropout, so that libraries can be compared."""
    shape = MODELS[size]
    return transformers.BertConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


class Encoders:
    """One set of weights as each library wants it; every form is made once, when asked for."""

    def __init__(self, size: str, dtype: torch.dtype, device: str):
        self.size, self.dtype, self.device = size, dtype, device
        torch.manual_seed(0)
        self.sdpa = self._make(transformers.BertModel, "sdpa").to(device, dtype).eval()
        self.state = self.sdpa.state_dict()
        self._made: dict[str, Any] = {}

    def _make(self, cls: type[nn.Module], attention: str = "sdpa", **options: Any) -> nn.Module:
        with torch.device(self.device):  # where the weights are drawn
            return cls._from_config(
                config_of(self.size), attn_implementation=attention, add_pooling_layer=False,
                **options,
            )  # fmt: skip

    def _with_weights(self, model: nn.Module) -> nn.Module:
        model.load_state_dict(self.state, assign=True)  # one set of weights in memory
        return model.to(self.device, self.dtype).eval()

    def get(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = getattr(self, f"_make_{name}")()
        return self._made[name]

    def _make_fastbert(self):
        return self._with_weights(self._make(fastbert.BertModel))

    def make_frozen(self, frozen: bool | str) -> nn.Module:
        """`fastbert.BertModel` with that option."""
        return self._with_weights(self._make(fastbert.BertModel, frozen=frozen))

    def _make_fastbert_frozen(self):
        return self.make_frozen(True)

    def _make_fastbert_graphs(self):
        return self._with_weights(self._make(fastbert.BertModel, cuda_graphs=True))

    def _make_fastbert_padded(self):
        return self._with_weights(self._make(fastbert.BertModel, padding="keep"))

    def _make_eager(self):
        return self._with_weights(self._make(transformers.BertModel, "eager"))

    def _make_oracle(self):
        return copy.deepcopy(self.get("eager")).double()

    def _make_compiled(self):
        torch._dynamo.reset()
        # Compiled anew for every shape: with a dynamic one it would not be at its best.
        mode = "max-autotune" if self.device == "cuda" else None
        return torch.compile(self.sdpa, mode=mode, dynamic=False)

    def _make_freezing(self):
        """Inductor keeps weights as constants, in oneDNN's layout; without it it packs none."""
        torch._dynamo.reset()
        model = copy.deepcopy(self.sdpa).requires_grad_(False)
        return torch.compile(model, dynamic=False, options={"freezing": True})

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

    def _make_ctranslate2(self):
        """Its converter reads a folder with a pooler and a tokenizer, neither of which is used."""
        import ctranslate2
        from ctranslate2.converters import TransformersConverter

        config = config_of(self.size)
        config.position_embedding_type = "absolute"  # which transformers no longer says
        model = transformers.BertModel(config)
        model.load_state_dict(self.state, strict=False)
        with tempfile.TemporaryDirectory(prefix="fastbert-ct2-") as folder:
            words, plain, converted = (Path(folder) / name for name in ("words", "hf", "ct2"))
            words.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]")
            transformers.BertTokenizer(vocab=str(words)).save_pretrained(plain)
            model.save_pretrained(plain)
            TransformersConverter(str(plain)).convert(str(converted))
            return ctranslate2.Encoder(
                str(converted), compute_type="float32", intra_threads=torch.get_num_threads()
            )


@lru_cache(maxsize=1)
def encoders_of(size: str, dtype: torch.dtype, device: str) -> Encoders:
    """The last one asked for is kept: workloads of a model follow each other."""
    return Encoders(size, dtype, device)


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


def providers_of(encoders: Encoders) -> dict[str, Callable[[], Callable[[Inputs], Any]]]:
    """Builders of what is timed: inputs -> ``[B, S, E]``."""

    def of_model(kind: str | None):
        def build():
            model = encoders.sdpa if kind is None else encoders.get(kind)

            def run(x: Inputs):
                with torch.inference_mode():
                    return model(**x).last_hidden_state

            return run

        return build

    def of_graphs():
        if encoders.device != "cuda":
            raise Unavailable("CUDA graphs need a GPU")
        return of_model("fastbert_graphs")()

    def of_frozen():
        if encoders.device != "cpu":
            raise Unavailable("frozen weights make a difference on CPUs only")
        return of_model("fastbert_frozen")()

    def of_freezing():
        if encoders.device != "cpu":
            raise Unavailable("freezing is measured on CPUs only")
        model = encoders.get("freezing")

        def run(x: Inputs):
            with torch.no_grad():
                return model(**x).last_hidden_state

        return run

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

    def of_ctranslate2():
        import ctranslate2

        encoder, view = encoders.get("ctranslate2"), ctranslate2.StorageView.from_array

        def run(feed):
            ids, lengths = feed["input_ids"], feed["attention_mask"].sum(1)
            result = encoder.forward_batch(view(ids.astype("int32")), view(lengths.astype("int32")))
            return numpy.asarray(result.last_hidden_state)

        return run

    return {
        OURS: of_model("fastbert"),
        OWN_FROZEN: of_frozen,
        OWN_GRAPHS: of_graphs,
        OWN_PADDED: of_model("fastbert_padded"),
        BASELINE: of_model(None),
        EAGER: of_model("eager"),
        COMPILED: of_compiled,
        FREEZING: of_freezing,
        TORCH_ENCODER: of_torch_encoder,
        ORT: on_cpu("onnxruntime", of_onnxruntime),
        OPENVINO: on_cpu("openvino", of_openvino),
        CTRANSLATE2: on_cpu("ctranslate2", of_ctranslate2),
    }
