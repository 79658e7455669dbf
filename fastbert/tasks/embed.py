"""Sentence embeddings: tokenise, batch by tokens instead of by sentences, encode packed, pool."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import LoadError
from .loading import load_model, load_tokenizer

__all__ = ["Embedder", "Pooling", "batches_by_tokens"]

_POOLING = {
    "mean": ("mean", "pooling_mode_mean_tokens"),
    "cls": ("cls", "pooling_mode_cls_token"),
    "max": ("max", "pooling_mode_max_tokens"),
}


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one: ``mean``, ``cls`` or ``max``, then to length 1 or not."""

    kind: str = "mean"
    normalize: bool = False

    @classmethod
    def from_folder(cls, folder: Path) -> tuple[Pooling, bool]:
        """What sentence-transformers' files beside a model ask for, and if there are any.

        Raises:
            LoadError: a module that is not covered here.
        """
        listing = folder / "modules.json"
        if not listing.is_file():
            return cls(), False
        kind, normalize = None, False
        for module in json.loads(listing.read_text("utf-8")):
            name = module["type"].rpartition(".")[2]
            if name == "Pooling":
                kind = _pooling_kind(folder / module["path"] / "config.json")
            elif name == "Normalize":
                normalize = True
            elif name != "Transformer":
                raise LoadError(
                    f"expected Transformer, Pooling and Normalize in {str(listing)!r}, got {name}; "
                    "use fastbert.accelerate(SentenceTransformer(...)) from Python for this model"
                )
        return cls(kind or "mean", normalize), True

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """``[B, S, E]`` and ``[B, S]`` -> ``[B, E]``."""
        real = mask.bool().unsqueeze(-1)
        if self.kind == "cls":
            pooled = hidden[:, 0]
        elif self.kind == "max":
            pooled = hidden.masked_fill(~real, -torch.inf).amax(1)
        else:
            pooled = (hidden * real).sum(1) / real.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled


def _pooling_kind(path: Path) -> str:
    config = json.loads(path.read_text("utf-8"))
    asked = config.get("pooling_mode")
    if asked is None:
        asked = [k.removeprefix("pooling_mode_") for k, v in config.items()
                 if k.startswith("pooling_mode_") and v]  # fmt: skip
    asked = [asked] if isinstance(asked, str) else list(asked)
    for kind, names in _POOLING.items():
        if [f"pooling_mode_{a.removeprefix('pooling_mode_')}" for a in asked] == [names[1]] or (
            asked == [kind]
        ):
            return kind
    raise LoadError(
        f"expected one pooling of {', '.join(_POOLING)} in {str(path)!r}, got {asked}; "
        "use fastbert.accelerate(SentenceTransformer(...)) from Python for this model"
    )


def batches_by_tokens(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in batches of at most ``budget`` tokens, longest first; a longer one is alone."""
    batch: list[int] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and total + lengths[index] > budget:
            yield batch
            batch, total = [], 0
        batch.append(index)
        total += lengths[index]
    if batch:
        yield batch


class Embedder:
    """A model, its tokenizer and its pooling: texts in, vectors out.

    Args:
        model: a BERT encoder; fastbert's skips the padding.
        tokenizer: its tokenizer.
        pooling: how tokens become one vector.
        max_length: tokens after which a text is cut.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pooling: Pooling,
        max_length: int,
    ):
        self.model, self.tokenizer, self.pooling = model, tokenizer, pooling
        self.max_length = max_length
        self.size = model.config.hidden_size

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        max_length: int | None = None,
        allow_pickle: bool = False,
    ) -> Embedder:
        """From a local folder (sentence-transformers' files are honoured) or a hub name.

        Raises:
            LoadError: no usable model or tokenizer there, or a ``max_length`` it does not have.
        """
        folder = Path(source)
        model = load_model(
            "BertModel", source, device=device, dtype=dtype, allow_pickle=allow_pickle
        )
        tokenizer = load_tokenizer(source)
        pooling, _ = Pooling.from_folder(folder)
        limit = model.config.max_position_embeddings
        if max_length is not None and not 2 < max_length <= limit:
            raise LoadError(f"expected a maximum length from 3 to {limit}, got {max_length}")
        listed = folder / "sentence_bert_config.json"
        if max_length is None and listed.is_file():
            max_length = json.loads(listed.read_text("utf-8")).get("max_seq_length")
        return cls(model, tokenizer, pooling, min(max_length or limit, limit))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, cut to the maximum length."""
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)
        return encoded["input_ids"]

    def collate(self, ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """A padded batch ``[B, S]``; its mask stays on the host, where reading it is free."""
        length = max(map(len, ids))
        pad = self.tokenizer.pad_token_id or 0
        padded = torch.tensor([[*row, *[pad] * (length - len(row))] for row in ids])
        lengths = torch.tensor([len(row) for row in ids])
        mask = (torch.arange(length) < lengths[:, None]).long()
        return {"input_ids": padded.to(self.model.device), "attention_mask": mask}

    @torch.inference_mode()
    def encode_batch(self, batch: dict[str, Tensor]) -> Tensor:
        """``[B, E]`` in fp32 on the host."""
        hidden = self.model(**batch).last_hidden_state.float()
        return self.pooling(hidden, batch["attention_mask"].to(hidden.device)).cpu()

    def embed(self, texts: Sequence[str], *, batch_tokens: int = 16384) -> np.ndarray:
        """Embeddings of texts, in their order.

        Args:
            texts: any number.
            batch_tokens: real tokens in one forward pass.

        Returns:
            ``[len(texts), E]`` fp32.
        """
        out = np.zeros((len(texts), self.size), dtype=np.float32)
        ids = self.tokenize(texts) if texts else []
        for batch in batches_by_tokens([len(row) for row in ids], batch_tokens):
            out[batch] = self.encode_batch(self.collate([ids[i] for i in batch])).numpy()
        return out

    def stream(
        self, texts: Iterable[str], *, batch_tokens: int = 16384, window: int = 4096
    ) -> Iterator[tuple[list[str], np.ndarray]]:
        """Embeddings of a stream of any length, ``window`` texts at a time, in order."""
        held: list[str] = []
        for text in texts:
            held.append(text)
            if len(held) == window:
                yield held, self.embed(held, batch_tokens=batch_tokens)
                held = []
        if held:
            yield held, self.embed(held, batch_tokens=batch_tokens)
