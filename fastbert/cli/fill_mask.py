"""``fastbert fill-mask``: what stands behind [MASK]."""

from typing import Annotated

import typer

from ..tasks.errors import InputError
from .options import AllowPickle, Device, Dtype

__all__ = ["command"]


def command(
    text: Annotated[str, typer.Argument(help="A text with one or more mask tokens.")],
    model: Annotated[str, typer.Option(help="A folder or hub name of a masked language model.")],
    top_k: Annotated[int, typer.Option(min=1, help="Candidates for each mask.")] = 5,
    device: Device = "auto",
    dtype: Dtype = "auto",
    allow_pickle: AllowPickle = False,
) -> None:
    """Show the likeliest tokens for each [MASK] in TEXT."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from ..tasks.loading import load_model, load_tokenizer, resolve_device, resolve_dtype

    where = resolve_device(device)
    masked_lm = load_model(
        "BertForMaskedLM",
        model,
        device=where,
        dtype=resolve_dtype(dtype, where),
        allow_pickle=allow_pickle,
        frozen=True,
    )
    tokenizer = load_tokenizer(model)
    mask = tokenizer.mask_token
    if mask is None or mask not in text:
        raise InputError(f"expected {mask or 'a mask token'} in the text, got {text!r}")
    inputs = tokenizer(text, return_tensors="pt").to(where)
    length, limit = inputs["input_ids"].shape[1], masked_lm.config.max_position_embeddings
    if length > limit:
        raise InputError(f"expected at most {limit} tokens, got {length}; shorten the text")
    with torch.inference_mode():
        scores = masked_lm(**inputs).logits[0].float().softmax(-1)
    places = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten()
    console = Console()
    for number, place in enumerate(places.tolist(), start=1):
        title = f"{mask} {number}" if len(places) > 1 else None
        table = Table("token", "probability", "text", title=title)
        best = scores[place].topk(min(top_k, scores.shape[-1]))
        for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            token = tokenizer.decode([index])
            table.add_row(token, f"{value:.4f}", _filled(text, mask, number, token))
        console.print(table)


def _filled(text: str, mask: str, number: int, token: str) -> str:
    """The text with its ``number``-th mask replaced."""
    parts = text.split(mask)
    return mask.join(parts[:number]) + token + mask.join(parts[number:])
