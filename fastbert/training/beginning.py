"""What a pre-training run begins with: a tokenizer and a model, loaded or new."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock
from transformers import BertConfig, BertTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import fastbert

from ..tasks.durable import publish
from ..tasks.errors import InputError, LoadError
from ..tasks.loading import load_for_training, load_tokenizer
from ..tasks.reading import BadRow, TextFile
from .corpus import documents
from .request import Request
from .run_folder import writing_in

__all__ = ["SIZES", "model_for", "tokenizer_for"]

# Layers, hidden size, heads: the sizes that BERT's authors have published.
SIZES = {
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "medium": (8, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}


def tokenizer_for(request: Request, files: list[Path]) -> PreTrainedTokenizerBase:
    """The one that was asked for, or the model's, or one that is trained on the texts.

    Raises:
        LoadError: one that cannot be read, or without the special tokens of BERT.
    """
    source = request.tokenizer or request.model
    if source is None:
        source = _trained_tokenizer(request, files)
    tokenizer = load_tokenizer(source)
    for name in ("cls_token", "sep_token", "mask_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise LoadError(
                f"expected a tokenizer with a {name}, as BERT's, got one without in {source!r}"
            )
    return tokenizer


def _trained_tokenizer(request: Request, files: list[Path]) -> Path:
    """The folder of the run's own tokenizer, which the first process to come trains."""
    folder = Path(request.output)
    with writing_in(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "tokenizer.lock")
        with lock:
            if not (folder / "tokenizer").exists():
                _train_tokenizer(request, files).save_pretrained(folder / ".new-tokenizer")
                publish(folder / ".new-tokenizer", folder / "tokenizer")
    return folder / "tokenizer"


def _train_tokenizer(request: Request, files: list[Path]) -> PreTrainedTokenizerBase:
    special = {name: i for i, name in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))}
    empty = BertTokenizer(vocab=special, do_lower_case=not request.cased)
    readers = (TextFile(f, None if TextFile(f).kind == "txt" else request.column) for f in files)
    texts = (d for reader in readers for d in documents(reader) if not isinstance(d, BadRow))
    tokenizer = empty.train_new_from_iterator(texts, request.vocab_size, show_progress=False)
    tokenizer.model_max_length = max(request.max_length, 512)
    return tokenizer


def model_for(
    request: Request, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, list[str]]:
    """The checkpoint to go on with, or a model from scratch; and what the checkpoint lacks of it.

    Raises:
        InputError: an unknown size, or examples longer than the model knows.
        LoadError: a checkpoint that cannot be loaded, or too small for the tokenizer.
    """
    cls = fastbert.BertForPreTraining if request.nsp else fastbert.BertForMaskedLM
    if request.model is not None:
        head = cls.__name__.removeprefix("Bert")
        model, new = load_for_training(head, request.model, types=("bert",), skip_logits=True)
    elif request.size not in SIZES:
        raise InputError(f"expected a --size of {', '.join(SIZES)}, got {request.size!r}")
    else:
        layers, hidden, heads = SIZES[request.size]
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers,
            num_attention_heads=heads, intermediate_size=4 * hidden,
            max_position_embeddings=max(request.max_length, 512),
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        model, new = cls(config, skip_logits=True), []
    config = model.config
    if len(tokenizer) > config.vocab_size:
        raise LoadError(
            f"expected a tokenizer of at most {config.vocab_size} tokens, the rows of the model's "
            f"table, got {len(tokenizer)}; use the tokenizer that the model was trained with"
        )
    if request.max_length > config.max_position_embeddings:
        raise InputError(
            f"expected a --max-length of at most {config.max_position_embeddings}, the positions "
            f"that the model knows, got {request.max_length}"
        )
    return model, new
