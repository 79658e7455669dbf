"""What autograd keeps of BERT's layers between forward and backward: ``python -m
fastbert.benchmarks.saved_memory``.

Counted with ``torch.autograd.graph.saved_tensors_hooks`` on fake tensors, which have shapes, dtypes
and storages and no memory: exact, the same on every machine, no GPU needed. Every storage counts
once, parameters do not. transformers runs sdpa with attention dropout 0, whose kernels keep no
probabilities; ours runs the Triton kernels with dropout everywhere.
"""

from __future__ import annotations

import argparse
import os

import torch

if not torch.cuda.is_available():  # the kernels are only asked for shapes, but have to import
    os.environ.setdefault("TRITON_INTERPRET", "1")

import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

import fastbert

from .encoders import config_of
from .kept import kept_for_backward
from .shapes import MODELS

__all__ = ["saved_bytes"]

DROPOUT = 0.1


def saved_bytes(
    kind: str,
    *,
    model: str = "base",
    layers: int = 2,
    batch: int = 8,
    length: int = 512,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes kept for backward by a stack of layers in training.

    Args:
        kind: ``"fastbert"`` or ``"transformers"``.
        model: one of `fastbert.benchmarks.shapes.MODELS`.
        layers, batch, length, dtype: how many layers, the padded batch without padding, of what.
    """
    config = config_of(model)
    config.num_hidden_layers = layers
    config.hidden_dropout_prob = DROPOUT
    config.attention_probs_dropout_prob = DROPOUT if kind == "fastbert" else 0.0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with FakeTensorMode(), torch.device(device):
        made = fastbert.BertModel if kind == "fastbert" else transformers.BertModel
        encoder = made._from_config(
            config, dtype=dtype, attn_implementation="sdpa", add_pooling_layer=False
        ).train()
        # What enters the layers is kept by whatever made it.
        hidden = torch.zeros(batch, length, config.hidden_size, dtype=dtype, requires_grad=True)
        with (
            fastbert.backend("triton" if kind == "fastbert" else "torch"),
            kept_for_backward(encoder) as kept,
        ):
            encoder(inputs_embeds=hidden)
    return kept.bytes


def main() -> None:
    """Print a table: bytes for each added layer, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="base", choices=sorted(MODELS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    sizes = {"model": args.model, "batch": args.batch, "length": args.length}
    print(f"kept for backward, {args.model}, B{args.batch} S{args.length}, dropout {DROPOUT}")
    for dtype in (torch.bfloat16, torch.float32):
        for layers in (2, 12):
            ours, theirs = (
                saved_bytes(kind, layers=layers, dtype=dtype, **sizes)
                for kind in ("fastbert", "transformers")
            )
            print(
                f"{str(dtype)[6:]:9} {layers:2} layers: fastbert {ours / 2**20:7.1f} MiB, "
                f"transformers sdpa {theirs / 2**20:7.1f} MiB, {ours / theirs:.3f}x"
            )


if __name__ == "__main__":
    main()
