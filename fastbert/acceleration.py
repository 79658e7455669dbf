"""Turning one loaded model into its fast twin, in place, and back."""

from __future__ import annotations

import logging
import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .families.drop_in import DropIn, check_config, clear_options, set_options, to_twins
from .families.in_flight import changing
from .families.model import PackedModel
from .families.obstacle import obstacle
from .families.registry import MODEL_TYPES, family_of

__all__ = ["Acceleration", "accelerate"]

_log = logging.getLogger("fastbert")


class Acceleration:
    """What `accelerate` did to a model, and the way back. A context manager: leaving it undoes.

    Attributes:
        model: the model, the very object that was given.
        changed: names of the modules inside it whose class changed, in order.
        notes: what could not be accelerated, and why; also logged once.
    """

    def __init__(
        self,
        model: nn.Module,
        changed: list[tuple[nn.Module, type[nn.Module]]],
        notes: list[str],
        options: list[DropIn],
    ):
        self.model = model
        self.notes = notes
        self._changed, self._options = changed, options
        names = {id(module): name for name, module in model.named_modules()}
        self.changed = [names[id(module)] for module, _ in changed]

    def undo(self) -> nn.Module:
        """Give every module its own class back, and take back the options. Harmless when done
        twice; waits for calls that other threads are inside of."""
        with changing([module for module, _ in self._changed] + self._options):
            clear_options(self._options)
            _back(self._changed)
            self._changed, self._options = [], []
        return self.model

    def refresh(self) -> None:
        """Have ``frozen`` weights copied again, after a change that torch does not count."""
        for module in self._options:
            if module.frozen is not None:
                module.frozen.forget()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "accelerate() changes the model in place and returns a handle for undo(); "
            "call the model itself, or handle.model"
        )

    def __repr__(self) -> str:
        notes = f", notes={self.notes}" if self.notes else ""
        return f"Acceleration({type(self.model).__name__}, {len(self.changed)} modules{notes})"


def _around(model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
    """The twins of sentence-transformers' modules."""
    if "sentence_transformers" not in sys.modules:
        return []
    try:
        from .families.sentence_modules import to_twins as to_sentence_twins
    except ImportError:  # one before 6, which has no such modules
        return []
    return to_sentence_twins(model)


def _back(changed: list[tuple[nn.Module, type[nn.Module]]]) -> None:
    for module, cls in changed:
        module.__class__ = cls


def accelerate(
    model: nn.Module,
    *,
    padding: str = "zeros",
    skip_logits: bool = False,
    cuda_graphs: bool = False,
    frozen: bool | str = False,
) -> Acceleration:
    """Make encoders inside ``model`` run packed. Changes this instance only; parameters stay as
    they are.

    The model may be a transformers BERT with any head, or anything that contains one: a
    ``SentenceTransformer``, a ``CrossEncoder``, a PEFT model, a module of your own. Modules get
    the class of their drop-in twin (`fastbert.BertModel` and so on), nothing is wrapped and
    nothing is copied, so hooks, optimizers and references that exist stay good. A
    ``SparseEncoder`` pools logits that never exist as one tensor. Doing it twice changes nothing.
    A call that another thread is inside of finishes as it began, before that.

    Args:
        model: a module on any device, in any dtype.
        padding: what hidden states hold at padding. ``"zeros"``, and nothing is computed there, as
            in ``flash_attn``'s padded form; what pools without a mask, or a convolution or an LSTM
            on top, sees it. ``"keep"`` computes padding as transformers does, at its cost, for
            whoever reads it. Tokens that fill up a query are computed without it in a
            ``MultiVectorEncoder`` of sentence-transformers.
        skip_logits: in training with labels, a masked-LM head computes labelled tokens only, never
            a tensor of all logits, and returns None as ``logits`` (or ``prediction_logits``). A
            call decides for itself with the same keyword; evaluation gives logits as ever.
        cuda_graphs: in inference on a GPU, run all layers as one launch (`fastbert.graphs`), for
            batches of up to 32768 tokens: a GPU is often done with them before the host has
            launched them one by one. Each size of a ladder is captured at its first use, which
            takes a moment, and the graphs hold memory for the largest one. No effect elsewhere.
        frozen: the promise that weights stay as they are, for inference. On a CPU in fp32 and bf16
            the layers then run from copies of their weights in oneDNN's own layout (in fp32 MiniLM
            43 MB, BERT base 340 MB), made at the first call; and glibc then keeps up to 64 MB that
            are freed for the next call. Weights that change all the same (by ``load_state_dict``,
            an optimizer, in place, ``.to()``) are copied again; a change that torch does not count,
            through ``.data`` or a numpy view, needs ``handle.refresh()``. Training and calls with
            gradients run as ever. No effect elsewhere. ``"int8"``, for models in fp32, quantises
            the copies to a quarter of that memory, and rows as they come, each by itself: faster
            where products are most of the time, and not the same result (`docs/accuracy.md` has
            what it does to a search).

    Returns:
        An `Acceleration`: ``handle.undo()`` or ``with fastbert.accelerate(model): ...`` for the
        way back.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no encoder of a covered family inside it, or with ``skip_logits`` no
            masked-LM head; another ``padding`` or ``frozen``, or ``"int8"`` where torch has no
            products for it.
        NotImplementedError: its config asks for relative position embeddings.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate: expected a torch.nn.Module, got {type(model).__name__}; "
            "for a pipeline give pipeline.model"
        )
    encoders = [
        (name, module)
        for name, module in model.named_modules()
        if (family := family_of(type(module))) is not None and isinstance(module, family.model)
    ]
    if not encoders:
        found = [type(m).__name__ for m in model.modules() if isinstance(m, PreTrainedModel)]
        inside = f"one with a {found[-1]}" if found else f"a {type(model).__name__} without one"
        raise ValueError(
            f"accelerate: expected a model with a transformers encoder inside, got {inside}; "
            f"covered are {', '.join(MODEL_TYPES)}"
        )
    for _, encoder in encoders:
        check_config(encoder.config)
    with changing(model.modules()):
        changed = to_twins(model) + _around(model)
        try:
            options = set_options(
                model,
                padding=padding,
                skip_logits=skip_logits,
                cuda_graphs=cuda_graphs,
                frozen=frozen,
            )
        except ValueError:
            _back(changed)
            raise
    notes = []
    for name, encoder in encoders:
        where = name or type(encoder).__name__
        if not isinstance(encoder, PackedModel):
            reason = f"{type(encoder).__name__} is a subclass with code of its own"
        else:
            reason = obstacle(encoder)
        if reason is not None:
            notes.append(f"{where}: {reason}")
    if notes:
        _log.warning(
            "fastbert.accelerate leaves to transformers' own code: %s. "
            "It stays right and is not faster.",
            "; ".join(notes),
        )
    return Acceleration(model, changed, notes, options)
