"""Sentence embeddings: what sentence-transformers' ``encode`` gives, from packed batches.

The model, its tokenizer and everything after the encoder are sentence-transformers' own, so that a
folder means what it means there. What is done differently is how texts are batched: by tokens
instead of by number, with the next texts tokenised while these are encoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import fastbert

from .errors import LoadError
from .loading import add_to_digest, load_sentence_transformer, max_length_of
from .windows import Row, Windows, encode_rows, mean_of_windows, pad_rows

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["WINDOW", "Batch", "Embedder", "Prepared", "batches_by_tokens"]

WINDOW = 1024  # texts that are sorted by length, encoded and written together


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


class Batch(NamedTuple):
    """Texts that are encoded together.

    Attributes:
        indices: which of the texts, ``B`` of them.
        features: what the model takes: ids, types and mask, padded ``[B, S]``, on the host.
    """

    indices: list[int]
    features: dict[str, Any]


class Prepared(NamedTuple):
    """Texts that can be encoded.

    Attributes:
        number: of the texts.
        batches: of all of them, or of their windows.
        owners: which text each window is of, ``[windows]``; None where there are no windows.
    """

    number: int
    batches: list[Batch]
    owners: np.ndarray | None


class Embedder:
    """A sentence-transformers model behind batches by tokens: texts in, vectors out.

    Args:
        model: accelerated or not; it is put into evaluation mode.
        prompt: what is put before every text; by default the model's own default prompt.
        prompt_name: one of the model's prompts instead.
        normalize: scale every vector to length 1, whatever the model does.
        truncate_dim: keep so many values of each vector; by default what the model says.
        max_length: tokens after which a text is cut; by default what the model says.
        windows: a longer text is read in windows that overlap instead; its vector is their mean,
            scaled to length 1 where the model does that. The prompt stands in each.

    Raises:
        LoadError: a prompt or a maximum length that the model does not have, a model that does not
            make vectors of tokens, or a prompt that leaves no room in a window.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        normalize: bool = False,
        truncate_dim: int | None = None,
        max_length: int | None = None,
        windows: bool = False,
    ):
        self.model, self.normalize, self.windows = model.eval(), normalize, windows
        self.truncate_dim = model.truncate_dim if truncate_dim is None else truncate_dim
        self.prompt = _prompt(model, prompt, prompt_name)
        self._limit_length(max_length)
        probe = model.preprocess(["a"], prompt=self.prompt)
        if not {"input_ids", "attention_mask"} <= set(probe):
            raise LoadError(
                "expected a model whose first module is a transformer over text, got "
                f"{type(model[0]).__name__}, which gives {', '.join(probe)}; use "
                "SentenceTransformer.encode for it"
            )
        self._windows = Windows(model, self.prompt) if windows else None
        # The same for every text: the modality, and how much of it the prompt is.
        self._shared = {k: v for k, v in probe.items() if not isinstance(v, Tensor)}
        try:
            self.size = self.embed(["a"]).shape[1]
        except KeyError:
            raise LoadError(
                "expected a model whose modules end in a sentence embedding, got "
                f"{', '.join(type(module).__name__ for module in model)}"
            ) from None

    def _limit_length(self, max_length: int | None) -> None:
        positions = max_length_of(self.model.transformers_model.config)
        if max_length is not None and not 2 < max_length <= positions:
            raise LoadError(f"expected a maximum length from 3 to {positions}, got {max_length}")
        self.max_length = min(max_length or self.model.max_seq_length or positions, positions)
        self.model.max_seq_length = self.max_length

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        allow_pickle: bool = False,
        accelerated: bool = True,
        int8: bool = False,
        **options: Any,
    ) -> Embedder:
        """From a local folder or a hub name.

        Args:
            source: what ``SentenceTransformer(source)`` takes. A plain transformers folder gets
                mean pooling there.
            device, dtype: where and as what the encoder runs; what follows it runs in fp32.
            allow_pickle: load ``pytorch_model.bin`` where there are no safetensors.
            accelerated: run `fastbert.accelerate` on the model, with frozen weights.
            int8: of these weights, and of rows as they come, in place of fp32; on a CPU.
            options: of the constructor.

        Raises:
            LoadError: no usable model there, int8 elsewhere or for layers that have none, or the
                constructor's.
        """
        if int8 and not (accelerated and device.type == "cpu" and dtype == torch.float32):
            raise LoadError(
                f"expected int8 of an accelerated model in float32 on a CPU, got {dtype} on "
                f"{device.type}{'' if accelerated else ', not accelerated'}; leave int8 out"
            )
        model = load_sentence_transformer(
            source, device=device, dtype=dtype, allow_pickle=allow_pickle
        )
        first, *rest = model
        for module in rest:
            module.float()
        first.register_forward_hook(_for_what_follows)
        if accelerated:
            try:
                fastbert.accelerate(model, frozen="int8" if int8 else True)
            except (NotImplementedError, ValueError) as error:
                raise LoadError(f"cannot accelerate {str(source)!r}: {error}") from error
        embedder = cls(model, **options)
        if int8 and embedder.computes_in != "int8":
            raise LoadError(
                f"expected layers of plain weights for int8, and no forced backend but torch, got "
                f"{str(source)!r} in {embedder.computes_in}; leave int8 out"
            )
        return embedder

    @property
    def is_plain(self) -> bool:
        """Whether there were no sentence-transformers files beside the model, so that it gets mean
        pooling."""
        return not self.model.module_kwargs

    @property
    def computes_in(self) -> str:
        """The dtype of the encoder, or ``"int8"``."""
        frozen = getattr(self.model.transformers_model, "frozen", None)
        if frozen is not None and frozen.form == "int8" and frozen.nbytes:
            return "int8"
        return str(self.model.dtype)

    def digest(self) -> str:
        """BLAKE2b of all that a vector follows from beside the text: weights, modules, tokens."""
        found = hashlib.blake2b(digest_size=16)
        tokens = getattr(self.model.tokenizer, "backend_tokenizer", None)
        found.update(repr(self.model).encode())
        found.update((tokens.to_str() if tokens else repr(self.model.tokenizer)).encode())
        add_to_digest(found, self.model.state_dict())
        return found.hexdigest()

    def tokenize(self, texts: Sequence[str]) -> list[Row]:
        """Ids, types and mask of each text, cut to the maximum length or, for windows, whole."""
        if not texts:
            return []
        return encode_rows(self.model, texts, self.prompt, whole=self.windows)[0]

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """A padded batch, ``[B, S]`` each, as the tokenizer pads."""
        return {**self._shared, **pad_rows(rows, self.model.tokenizer)}

    def prepare(self, texts: Sequence[str], batch_tokens: int = 16384) -> Prepared:
        """Texts as batches of at most ``batch_tokens`` real tokens."""
        rows, owners = self.tokenize(texts), None
        if self._windows is not None:
            parts = [self._windows.split(row) for row in rows]
            owners = np.repeat(np.arange(len(rows)), [len(part) for part in parts])
            rows = [window for part in parts for window in part]
        lengths = [len(row["input_ids"]) for row in rows]
        batches = [
            Batch(indices, self.collate([rows[i] for i in indices]))
            for indices in batches_by_tokens(lengths, batch_tokens)
        ]
        return Prepared(len(texts), batches, owners)

    def encode(self, features: dict[str, Any]) -> np.ndarray:
        """``[B, E]`` in fp32 of a padded batch."""
        return self._finish(self._encode(features)).numpy()

    def _finish(self, vectors: Tensor) -> Tensor:
        vectors = vectors[:, : self.truncate_dim]
        return nn.functional.normalize(vectors, dim=-1) if self.normalize else vectors

    @torch.inference_mode()
    def _encode(self, features: dict[str, Any]) -> Tensor:
        device = self.model.device
        # Real lengths are read from the mask: where it is, on the host, that is free.
        inputs = {
            name: value if name in self._shared or name == "attention_mask" else value.to(device)
            for name, value in features.items()
        }
        return self.model(inputs)["sentence_embedding"].float().cpu()

    def embed(self, texts: Sequence[str], *, batch_tokens: int = 16384) -> np.ndarray:
        """Embeddings of texts, in their order.

        Args:
            texts: any number.
            batch_tokens: real tokens in one forward pass.

        Returns:
            ``[len(texts), E]`` fp32.
        """
        return self._joined(self.prepare(texts, batch_tokens))

    def _joined(self, prepared: Prepared) -> np.ndarray:
        number, batches, owners = prepared
        if not batches:
            return np.zeros((0, self.size), np.float32)
        parts = torch.cat([self._encode(batch.features) for batch in batches])
        out = torch.empty_like(parts)
        out[[index for batch in batches for index in batch.indices]] = parts
        if self._windows is not None:
            out = mean_of_windows(self.model, out, torch.from_numpy(owners))
        assert len(out) == number
        return self._finish(out).numpy()

    def stream(
        self, texts: Iterable[str], *, batch_tokens: int = 16384, window: int = WINDOW
    ) -> Iterator[np.ndarray]:
        """Embeddings of a stream of any length, ``window`` texts at a time, in order.

        Texts are read and tokenised one window ahead, by a thread.
        """
        texts = iter(texts)

        def read_ahead() -> Prepared:
            return self.prepare(list(islice(texts, window)), batch_tokens)

        with ThreadPoolExecutor(1, "tokenise") as ahead:
            pending = ahead.submit(read_ahead)
            while (ready := pending.result()).number:
                pending = ahead.submit(read_ahead)
                yield self._joined(ready)


def _prompt(model: SentenceTransformer, prompt: str | None, name: str | None) -> str | None:
    if prompt is not None:
        return prompt
    if name is not None and name not in model.prompts:
        raise LoadError(f"expected a prompt of {sorted(model.prompts)}, got {name!r}")
    return model.prompts.get(model.default_prompt_name if name is None else name)


def _for_what_follows(module: nn.Module, args: tuple, features: dict[str, Any]) -> dict[str, Any]:
    """Pooling and what comes after it in fp32, and the mask where the vectors are."""

    def convert(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(convert, value))
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.float() if floating else value

    converted = {name: convert(value) for name, value in features.items()}
    device = next(module.parameters()).device
    converted["attention_mask"] = converted["attention_mask"].to(device)
    return converted
