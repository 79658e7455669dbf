"""A model of sentence-transformers that batches and texts of any size can be trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastbert

from ..tasks.embed import batches_by_tokens
from ..tasks.loading import load_sentence_transformer
from ..tasks.windows import Windows, encode_rows, mean_of_windows, pad_rows

__all__ = ["OWNERS", "SentenceEncoder", "load_embedding_model"]

OWNERS = "owners"  # the feature that says which text a window is of, [windows]


def load_embedding_model(
    source: str | Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    max_length: int | None = None,
    *,
    windows: bool = False,
    pass_tokens: int = 8192,
    frozen: bool = True,
) -> SentenceEncoder:
    """An accelerated model of sentence-transformers; a plain checkpoint gets mean pooling.

    Args:
        source, device, dtype: as `load_sentence_transformer`.
        max_length: tokens of a text or window; by default what the model says.
        windows, pass_tokens: as `SentenceEncoder`.
        frozen: its weights will not change.

    Raises:
        LoadError: no usable model there.
    """
    model = load_sentence_transformer(source, device=device, dtype=dtype)
    fastbert.accelerate(model, frozen=frozen)
    if max_length is not None:
        model.max_seq_length = max_length
    model.__class__ = SentenceEncoder
    model.windows, model.pass_tokens = windows, pass_tokens
    return model


class SentenceEncoder(SentenceTransformer):
    """Encodes in passes of so many tokens, and long texts in windows; it is saved as any other.

    While it trains, what several passes leave behind for the backward pass is computed again there
    (Chen et al., 2016), so that memory is bounded by a pass and not by the batch. Losses and
    gradients are those of one pass.

    Attributes:
        windows: longer texts are read in windows that overlap; otherwise they are cut.
        pass_tokens: of texts that are encoded together; a longer one is alone.
    """

    windows: bool
    pass_tokens: int

    def preprocess(
        self, inputs: Sequence[str], prompt: str | None = None, **options: Any
    ) -> dict[str, Any]:
        """Features of texts; in windows ``[windows, S]`` each, with their `OWNERS`."""
        if not self.windows or "processing_kwargs" in options:
            return super().preprocess(inputs, prompt=prompt, **options)
        rows, shared = encode_rows(self, inputs, prompt, whole=True, **options)
        windows = Windows(self, prompt)
        parts = [windows.split(row) for row in rows]
        owners = np.repeat(np.arange(len(rows)), [len(part) for part in parts])
        padded = pad_rows([window for part in parts for window in part], self.tokenizer)
        return {**shared, **padded, OWNERS: torch.from_numpy(owners)}

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        """``sentence_embedding`` ``[B, E]``, and more where everything is one pass."""
        inputs = {name: value for name, value in features.items() if name != OWNERS}
        if features["input_ids"].numel() <= self.pass_tokens:
            outputs = super().forward(inputs, **options)
        else:
            outputs = {**inputs, "sentence_embedding": self._in_passes(inputs)}
        if OWNERS in features:
            vectors = outputs["sentence_embedding"]
            outputs["sentence_embedding"] = mean_of_windows(self, vectors, features[OWNERS])
        return outputs

    def _in_passes(self, features: dict[str, Any]) -> Tensor:
        lengths = features["attention_mask"].sum(1).tolist()
        parts = list(batches_by_tokens(lengths, self.pass_tokens))
        again = torch.is_grad_enabled() and len(parts) > 1

        def encode(part: list[int]) -> Tensor:
            rows = {k: v[part] if isinstance(v, Tensor) else v for k, v in features.items()}
            return super(SentenceEncoder, self).forward(rows)["sentence_embedding"]

        vectors = torch.cat(
            [checkpoint(encode, part, use_reentrant=False) if again else encode(part)
             for part in parts]
        )  # fmt: skip
        order = torch.tensor([i for part in parts for i in part], device=vectors.device)
        return vectors[order.argsort()]
