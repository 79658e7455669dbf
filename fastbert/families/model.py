"""Every family's model and layer as drop-in classes.

Each class is its transformers parent and nothing more until ``forward``: parameters, state-dict
names, saving and loading are the parent's. `PackedModel` decides once per call. On the packed path
it packs the batch, runs transformers' own encoder loop with a `Call` where the attention mask would
be, and unpacks; `PackedLayer` sees the `Call` and computes the layer on packed rows. Any other call
goes to transformers' code, unchanged. What differs between families is read of their `Family`.
"""

from __future__ import annotations

import inspect
import threading
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput, output_capturing
from transformers.utils.output_capturing import _active_collector

from ..encoder import encode_layer, encode_layers, normalised, train_layers
from ..ops.backend import backend, forced
from ..packing import PackedBatch, PaddedBatch
from ..weights import LayerWeights
from . import known, modules
from .drop_in import DropIn, twin_of
from .family import Family
from .inputs import check_inputs, embed_rows, make_batch, read_sums, refuse_packed
from .obstacle import Found, call_obstacle, examine, say_once
from .outputs import output_of
from .plan import Plan, plan_of

__all__ = [
    "Call", "PackedLayer", "PackedModel", "arguments_not_packed", "first_position", "requesting",
]  # fmt: skip

# Newer versions of transformers take indices for output_hidden_states, older ones a flag.
_SELECTS = hasattr(output_capturing, "selected_hidden_states")


class _Request:
    """What a head asks of its encoder's next call, beside the arguments that everybody sees.

    Attributes:
        of: the encoder that is asked; None for any that the call reaches.
        rows: give packed rows as the hidden state, and the `Call` as ``output.call``.
        first: give the first row of each sequence alone, ``[B, 1, E]``, as the hidden state.
        bounds: ``cu_seq_lens_q`` of the call, for heads that do not hand it on.
        keep_padding: compute hidden states at padding, as transformers does.
    """

    def __init__(self):
        self.of: PackedModel | None = None
        self.rows = self.first = self.keep_padding = False
        self.bounds: Tensor | None = None


class _OfThread(threading.local):
    def __init__(self):
        self.request = _Request()

    def __reduce__(self) -> str:
        return "_of_thread"  # as in `fastbert.ops.backend`


_of_thread = _OfThread()
_of_compiler = _Request()  # which does not understand what belongs to a thread


def _current_request() -> _Request:
    return _of_compiler if torch.compiler.is_compiling() else _of_thread.request


def first_position(model: nn.Module) -> int:
    """Of each sequence, as the encoder inside a model counts them: 0 if there is none."""
    for module in model.modules():
        if isinstance(module, PackedModel):
            return module.family.sums.first_position(module.embeddings)
    return 0


@contextmanager
def requesting(
    encoder: nn.Module,
    *,
    rows: bool = False,
    first: bool = False,
    keep_padding: bool = False,
    bounds: Tensor | None = None,
):
    """Ask something of an encoder for the calls in this block.

    An encoder that is wrapped, or whose forward was replaced, is not asked for rows: whoever stands
    between sees what transformers would give.
    """
    known_one = isinstance(encoder, PackedModel) and known.untouched(
        encoder, twin_of(encoder.family.model)
    )
    request = _current_request()
    before = dict(vars(request))
    request.of = encoder if known_one else None
    request.rows, request.first = rows and known_one, first and known_one
    request.keep_padding, request.bounds = keep_padding, bounds
    try:
        yield
    finally:
        vars(request).update(before)


class Call(NamedTuple):
    """What one packed forward pass hands to every layer."""

    batch: PackedBatch | PaddedBatch
    keep_padding: bool
    hidden_states: list[Tensor | None] | None
    attentions: list[Tensor] | None
    selected: set[int] | None  # the hidden states that are wanted, if not all
    backend: str | None  # what was forced, which also rules what checkpointing computes again
    weights: dict[nn.Module, LayerWeights] | None = None  # of layers that need not be read

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Call:
        """For models that are spread over several devices: accelerate's hooks call it."""
        return self._replace(batch=self.batch.to(device, non_blocking=non_blocking))

    def padded(self, rows: Tensor) -> Tensor:
        """``[T, ...]`` -> ``[B, S, ...]``, as the caller gets it."""
        if self.keep_padding and isinstance(self.batch, PaddedBatch):
            return self.batch.view(rows)
        return self.batch.unpack(rows)

    def record(self, rows: Tensor) -> Tensor:
        """Keep the next hidden states, if they are wanted; gives the rows to go on with."""
        states = self.hidden_states
        if states is None:
            return rows
        if self.selected is not None and len(states) not in self.selected:
            states.append(None)
            return rows
        here = self.to(rows.device)  # of a model that is spread over several
        states.append(here.padded(rows))
        return here._resume(states[-1], rows)

    def record_instead(self, rows: Tensor) -> Tensor:
        """`record`, in the place of the last ones."""
        if self.hidden_states is not None:
            self.hidden_states.pop()
        return self.record(rows)

    def _resume(self, shown: Tensor, rows: Tensor) -> Tensor:
        """Rows again, which are made from what is shown where a gradient is wanted."""
        if not (torch.is_grad_enabled() and rows.requires_grad):
            return rows
        again = self.batch.pack(shown)
        mask = None if isinstance(self.batch, PackedBatch) else self.batch.key_mask
        if mask is not None and not self.keep_padding:  # go on with what padding has
            again = torch.where(mask.flatten()[:, None], again, rows)
        return again

    def first(self, shown: Tensor | None, rows: Tensor) -> Tensor:
        """``[B, 1, E]``, all that BERT's pooler reads; made from what is shown."""
        if shown is not None:
            if isinstance(self.batch, PackedBatch) and self.batch.indices is not None:
                return shown[:, :1]
            rows = self._resume(shown, rows)
        return self.batch.first_rows(rows)[:, None]

    def whole(self, shown: Tensor | None, rows: Tensor) -> Tensor:
        """``[B, S, E]`` with whatever padding has, for a pooler of another kind."""
        rows = rows if shown is None else self._resume(shown, rows)
        keep = isinstance(self.batch, PaddedBatch)
        return self.batch.view(rows) if keep else self.batch.unpack(rows)


class PackedLayer:
    """transformers' layer, which also takes packed rows ``[T, E]`` with a `Call` as its mask; comes
    first among the bases.

    Attributes:
        family: whose layer it is.
    """

    family: Family

    def __call__(self, *args, **kwargs):
        # Outside of forward, which activation checkpointing may run without a graph.
        output = super().__call__(*args, **kwargs)
        call = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        return call.record(output) if isinstance(call, Call) else output

    def forward(self, hidden_states: Tensor, attention_mask=None, *args, **kwargs):
        if not isinstance(attention_mask, Call):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        call = attention_mask
        if call.backend != forced():  # backward computes the layer again
            with backend(call.backend):
                return _encode(self, hidden_states, call)
        return _encode(self, hidden_states, call)


def _encode(layer: PackedLayer, rows: Tensor, call: Call) -> Tensor:
    weights = _layer_weights(layer) if call.weights is None else call.weights[layer]
    return encode_layer(rows, call.batch, weights, call.attentions)


def _layer_weights(layer: PackedLayer) -> LayerWeights:
    part = layer.family.parts.of(layer)
    attention = part["attention"]
    config = getattr(attention, "config", None)
    qkv = tuple(modules.projection(part[name]) for name in ("query", "key", "value"))
    hidden_dropout, output_dropout = part.get("hidden_dropout"), part.get("output_dropout")
    return LayerWeights(
        qkv=modules.stack(qkv),
        attention_output=modules.projection(part["attention_output"]),
        attention_norm=modules.norm(part["attention_norm"]),
        intermediate=modules.projection(part["intermediate"]),
        activation=modules.activation_name(part["activation"]),
        output=modules.projection(part["output"]),
        output_norm=modules.norm(part["output_norm"]),
        head_size=attention.attention_head_size,
        scale=getattr(attention, "scaling", attention.attention_head_size**-0.5),
        pre_norm=layer.family.parts.pre_norm,
        unfused=config is None or config._attn_implementation == "eager",
        attention_dropout=modules.dropout_p(part["attention_dropout"]) or 0.0,
        hidden_dropout=(hidden_dropout and modules.dropout_p(hidden_dropout)) or 0.0,
        output_dropout=(output_dropout and modules.dropout_p(output_dropout)) or 0.0,
    )


def _selected(hidden_states: bool | int | list[int] | None, count: int) -> set[int] | None:
    """Which of ``count`` hidden states ``output_hidden_states`` selects, None for all or none."""
    if isinstance(hidden_states, bool | None) or not _SELECTS:
        return None
    indices = [hidden_states] if isinstance(hidden_states, int) else hidden_states
    return {i % count for i in indices if -count <= i < count}


def _zero_padding(output: ModelOutput, mask: Tensor | None) -> None:
    """Give the output of transformers' code the zeros that a packed call has at padding.

    Not to hidden states that a gradient may be asked of: copies would not lie on its way.
    """
    last, states = output.last_hidden_state, output.hidden_states
    if mask is None or mask.shape != last.shape[:2]:
        return
    if states is not None and torch.is_grad_enabled() and last.requires_grad:
        return
    padding = (mask == 0)[..., None].to(last.device)
    output.last_hidden_state = last.masked_fill(padding, 0)
    if states is not None:
        output.hidden_states = tuple(
            None
            if state is None
            else output.last_hidden_state
            if state is last
            else state.masked_fill(padding, 0)
            for state in states
        )


# What a packed call reads of its arguments, beside what a family's embeddings do.
_PACKED = (
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds",
    "output_hidden_states", "output_attentions", "return_dict",
)  # fmt: skip


def arguments_not_packed(family: Family) -> tuple[str, ...]:
    """The arguments of a family's model that are for transformers' own code to deal with.

    All that it names but those that are known here, so that none which a later version brings is
    ever left out in silence.
    """
    parameters = inspect.signature(family.model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    packed = ("self", *_PACKED, *family.sums.further_inputs)
    # The name of a cache that newer versions take as well, but do not name.
    return tuple(n for n in dict.fromkeys((*named, "past_key_values")) if n not in packed)


class PackedModel(DropIn):
    """A model without padding between the embeddings and the head.

    The same parameters, arguments and outputs as transformers' class, with one difference: hidden
    states at padding are zeros, where transformers leaves numbers that mean nothing.

    Attributes:
        not_packed: arguments whose calls run transformers' code.
    """

    not_packed: tuple[str, ...] = ()

    def run(self, inputs: dict[str, Any]) -> ModelOutput:
        """A call, whose arguments come by name."""
        request = _current_request()
        asked = request.of is None or request.of is self
        keep_padding = self.padding == "keep" or (asked and request.keep_padding)
        if asked and request.bounds is not None:
            inputs["cu_seq_lens_q"] = request.bounds
        if inputs.pop("skip_logits", None):
            raise TypeError(
                "skip_logits: expected a call of a masked-LM head, got one of a model without "
                "logits over the vocabulary"
            )
        reason, found = self._reason(inputs)
        if reason is None:
            return self._packed(inputs, found, keep_padding, request if asked else None)
        refuse_packed(self, inputs, reason)
        say_once(f"runs transformers' own code for this call: {reason}")
        output = self.theirs.forward(self, **inputs, return_dict=True)
        if not keep_padding and found is not None:
            _zero_padding(output, inputs.get("attention_mask"))
        return output

    def _reason(self, inputs: dict[str, Any]) -> tuple[str | None, Found | None]:
        """Why this call runs transformers' code, or None, and what is known of the modules."""
        if getattr(self.config, "is_decoder", False):
            return "decoder mode is not packed", None
        for name in self.not_packed:
            value = inputs.get(name)
            if value is not None and value is not False:
                return f"{name} is not packed", None
        found = examine(self)
        return call_obstacle(inputs) or found.reason, found

    def _wanted(self, inputs: dict[str, Any], name: str) -> bool | int | list[int]:
        value = inputs.get(name)
        return getattr(self.config, name) if value is None else value

    def _packed(
        self, inputs: dict[str, Any], found: Found, keep_padding: bool, request: _Request | None
    ) -> ModelOutput:
        """A call on packed rows."""
        family, pooler = self.family, getattr(self, "pooler", None)
        as_rows = request is not None and request.rows
        first_only = request is not None and request.first
        want_hidden = self._wanted(inputs, "output_hidden_states")
        want_attentions = self._wanted(inputs, "output_attentions")
        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
        input_ids, attention_mask, *ids, inputs_embeds = map(inputs.get, names)
        # One row of ids for all sequences may come without its dimension.
        token_type_ids, position_ids = (
            row[None] if row is not None and row.dim() == 1 else row for row in ids
        )
        x = check_inputs(
            self, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        )
        foreign = pooler is not None and not found.pools_rows  # it may look at padding
        if foreign:
            kind = type(pooler).__name__
            say_once(f"computes padding for a pooler that it does not know ({kind})")
        batch = make_batch(
            self, x, attention_mask, position_ids, inputs,
            keep_padding=keep_padding or foreign, reads_first=pooler is not None or first_only,
            by_column=family.score_bias is not None,
        )  # fmt: skip
        packed = isinstance(batch, PackedBatch) and len(batch.lengths) != batch.padded_shape[0]
        if foreign and packed:
            raise ValueError(
                f"{type(self).__name__}: expected transformers' own pooler for packed sequences, "
                f"got a {kind}, which would take them for one; pass a padded batch"
            )
        if family.score_bias is not None:
            longest = batch.max_seqlen if isinstance(batch, PackedBatch) else x.shape[1]
            batch = batch.with_bias(family.score_bias(self, longest))
        call = Call(
            batch,
            keep_padding,
            [] if want_hidden else None,
            [] if want_attentions else None,
            _selected(want_hidden, len(family.layers(self)) + 1) if want_hidden else None,
            forced(),
        )
        plan = plan_of(self, found, _layer_weights)
        sums = read_sums(self) if plan is None or plan.sums is None else plan.sums
        rows = embed_rows(
            self, batch, sums, input_ids, token_type_ids, position_ids, inputs_embeds, inputs
        )
        rows = call.record(rows)
        rows = self._encoded(rows, call, plan, bool(want_hidden or want_attentions))
        if family.final_norm is not None:
            norm = modules.norm(self.get_submodule(family.final_norm))
            rows = call.record_instead(normalised(rows, norm))
        last, pooled = call.hidden_states[-1] if want_hidden else None, None
        if last is None and not as_rows and not first_only:
            last = call.padded(rows)
        if pooler is not None:
            pooled = family.pool(
                self, call.whole(last, rows) if foreign else call.first(last, rows)
            )
        if first_only:
            last = call.first(last, rows)
        values = {"last_hidden_state": rows if as_rows else last}
        if pooled is not None:
            values["pooler_output"] = pooled
        if want_hidden:
            values["hidden_states"] = tuple(call.hidden_states)
        if want_attentions:
            values["attentions"] = tuple(call.attentions)
            if "cross_attentions" in (self._can_record_outputs or ()):
                values["cross_attentions"] = ()
        output = output_of(family.output, **values)
        if as_rows:
            output.call = call
        return output

    def _encoded(self, rows: Tensor, call: Call, plan: Plan | None, watching: bool) -> Tensor:
        """Rows behind the last layer."""
        if plan is not None and not watching:
            if not torch.is_grad_enabled():
                run = self.frozen or encode_layers
                if self.graphs is None:
                    return run(rows, call.batch, plan.layers)
                return self.graphs(rows, call.batch, plan.layers, run)
            if not plan.recomputes:
                return train_layers(rows, call.batch, plan.layers)
        if plan is not None:
            call = call._replace(weights=plan.by_layer)
        if self.family.calls_layers:
            for layer in self.family.layers(self):
                rows = layer(rows, call)
            return rows
        # transformers' recorders would see packed rows; the call records what is wanted itself.
        token = _active_collector.set({})
        try:
            encoder = self.family.encoder_of(self)
            return encoder(rows, attention_mask=call).last_hidden_state
        finally:
            _active_collector.reset(token)
