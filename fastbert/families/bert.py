"""BERT's model and layer as drop-in classes, and where transformers keeps a layer's weights.

Each class is its transformers parent and nothing more until ``forward``: parameters, state-dict
names, saving and loading are the parent's. `BertModel.forward` decides once per call. On the
packed path it packs the batch, runs transformers' own encoder loop with a `Call` where the
attention mask would be, and unpacks; `BertLayer.forward` sees the `Call` and computes the layer
on packed rows. Any other call goes to transformers' code, unchanged.
"""

# Annotations are objects here, not strings: tools read them of a model's forward.
import threading
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.models.bert import modeling_bert as hf
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, output_capturing
from transformers.utils.output_capturing import _active_collector

from ..encoder import LayerWeights, encode_layer, encode_layers
from ..ops.backend import backend, forced
from ..packing import PackedBatch, PaddedBatch
from . import known, modules
from .bert_inputs import check_inputs, embed_rows, make_batch, refuse_packed
from .bert_obstacle import call_obstacle, examine, say_once
from .bert_plan import plan_of
from .drop_in import DropIn, twin

__all__ = ["BertLayer", "BertModel", "Call", "requesting"]

# Newer versions of transformers take indices for output_hidden_states, older ones a flag.
_SELECTS = hasattr(output_capturing, "selected_hidden_states")


class _Request:
    """What a head asks of its encoder's next call, beside the arguments that everybody sees.

    Attributes:
        of: the encoder that is asked; None for any that the call reaches.
        rows: give packed rows as the hidden state, and the `Call` as ``output.call``.
        keep_padding: compute hidden states at padding, as transformers does.
    """

    def __init__(self):
        self.of: hf.BertModel | None = None
        self.rows = self.keep_padding = False


class _OfThread(threading.local):
    def __init__(self):
        self.request = _Request()

    def __reduce__(self) -> str:
        return "_of_thread"  # as in `fastbert.ops.backend`


_of_thread = _OfThread()
_of_compiler = _Request()  # which does not understand what belongs to a thread


def _current_request() -> _Request:
    return _of_compiler if torch.compiler.is_compiling() else _of_thread.request


@contextmanager
def requesting(encoder: nn.Module, *, rows: bool = False, keep_padding: bool = False):
    """Ask something of an encoder for the calls in this block.

    An encoder that is wrapped, or whose forward was replaced, is not asked for rows: whoever stands
    between sees what transformers would give.
    """
    known_one = known.untouched(encoder, BertModel)
    request = _current_request()
    before = request.of, request.rows, request.keep_padding
    request.of = encoder if known_one else None
    request.rows, request.keep_padding = rows and known_one, keep_padding
    try:
        yield
    finally:
        request.of, request.rows, request.keep_padding = before


class Call(NamedTuple):
    """What one packed forward pass hands to every layer."""

    batch: PackedBatch | PaddedBatch
    keep_padding: bool
    hidden_states: list[Tensor | None] | None
    attentions: list[Tensor] | None
    selected: set[int] | None  # the hidden states that are wanted, if not all
    backend: str | None  # what was forced, which also rules what checkpointing computes again

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Call":
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


@twin
class BertLayer(hf.BertLayer):
    """transformers' layer, which also takes packed rows ``[T, E]`` with a `Call` as its mask."""

    def __call__(self, *args, **kwargs):
        # Outside of forward, which activation checkpointing may run without a graph.
        output = super().__call__(*args, **kwargs)
        call = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        return call.record(output) if isinstance(call, Call) else output

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | Call | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        if not isinstance(attention_mask, Call):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                past_key_values,
                **kwargs,
            )
        call = attention_mask
        if call.backend != forced():  # backward computes the layer again
            with backend(call.backend):
                return _encode(self, hidden_states, call)
        return _encode(self, hidden_states, call)


def _encode(layer: BertLayer, rows: Tensor, call: Call) -> Tensor:
    return encode_layer(rows, call.batch, _layer_weights(layer), call.attentions)


def _layer_weights(layer: hf.BertLayer) -> LayerWeights:
    attention, intermediate, output = layer.attention, layer.intermediate, layer.output
    heads, mixed = attention.self, attention.output
    qkv = tuple(modules.projection(m) for m in (heads.query, heads.key, heads.value))
    return LayerWeights(
        qkv=modules.stack(qkv),
        attention_output=modules.projection(mixed.dense),
        attention_norm=modules.norm(mixed.LayerNorm),
        intermediate=modules.projection(intermediate.dense),
        activation=modules.activation_name(intermediate.intermediate_act_fn),
        output=modules.projection(output.dense),
        output_norm=modules.norm(output.LayerNorm),
        head_size=heads.attention_head_size,
        scale=heads.scaling,
        unfused=heads.config._attn_implementation == "eager",
        attention_dropout=modules.dropout_p(heads.dropout) or 0.0,
        hidden_dropout=modules.dropout_p(mixed.dropout) or 0.0,
        output_dropout=modules.dropout_p(output.dropout) or 0.0,
    )


def _selected(hidden_states: bool | int | list[int] | None, count: int) -> set[int] | None:
    """Which of ``count`` hidden states ``output_hidden_states`` selects, None for all or none."""
    if isinstance(hidden_states, bool | None) or not _SELECTS:
        return None
    indices = [hidden_states] if isinstance(hidden_states, int) else hidden_states
    return {i % count for i in indices if -count <= i < count}


def _zero_padding(
    output: BaseModelOutputWithPoolingAndCrossAttentions, mask: Tensor | None
) -> None:
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


@twin
class BertModel(DropIn, hf.BertModel):
    """``transformers.BertModel`` without padding between the embeddings and the head.

    The same parameters, arguments and outputs, with one difference: hidden states at padding are
    zeros, where transformers leaves numbers that mean nothing.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | BaseModelOutputWithPoolingAndCrossAttentions:
        request = _current_request()
        asked = request.of is None or request.of is self
        as_rows = asked and request.rows
        keep_padding = self.padding == "keep" or (asked and request.keep_padding)
        if kwargs.pop("skip_logits", None):
            raise TypeError(
                "skip_logits: expected a call of a masked-LM head, got one of a model without "
                "logits over the vocabulary"
            )
        config = self.config
        want_hidden = kwargs.get("output_hidden_states")
        want_hidden = config.output_hidden_states if want_hidden is None else want_hidden
        want_attentions = kwargs.get("output_attentions")
        want_attentions = config.output_attentions if want_attentions is None else want_attentions
        if (
            config.is_decoder
            or encoder_hidden_states is not None
            or past_key_values is not None
            or use_cache
        ):
            reason, found = "decoder mode, cross-attention and caches are not packed", None
        else:
            found = examine(self)
            reason = call_obstacle(kwargs) or found.reason
        if reason is not None:
            refuse_packed(self, kwargs, reason)
            say_once(f"runs transformers' own code for this call: {reason}")
            return_dict = kwargs.pop("return_dict", None)
            output = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                return_dict=True,
                **kwargs,
            )
            if not keep_padding and found is not None:
                _zero_padding(output, attention_mask)
            return_dict = config.return_dict if return_dict is None else return_dict
            return output if return_dict else output.to_tuple()

        # One row of ids for all sequences may come without its dimension.
        token_type_ids, position_ids = (
            ids[None] if ids is not None and ids.dim() == 1 else ids
            for ids in (token_type_ids, position_ids)
        )
        x = check_inputs(
            self, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        )
        foreign = self.pooler is not None and not found.pools_rows  # it may look at padding
        if foreign:
            kind = type(self.pooler).__name__
            say_once(f"computes padding for a pooler that it does not know ({kind})")
        batch = make_batch(
            self, x, attention_mask, position_ids, kwargs, keep_padding=keep_padding or foreign
        )
        packed = isinstance(batch, PackedBatch) and len(batch.lengths) != batch.padded_shape[0]
        if foreign and packed:
            raise ValueError(
                f"{type(self).__name__}: expected transformers' own pooler for packed sequences, "
                f"got a {kind}, which would take them for one; pass a padded batch"
            )
        call = Call(
            batch,
            keep_padding,
            [] if want_hidden else None,
            [] if want_attentions else None,
            _selected(want_hidden, len(self.encoder.layer) + 1),
            forced(),
        )
        rows = embed_rows(
            self.embeddings, batch, input_ids, token_type_ids, position_ids, inputs_embeds
        )
        rows = call.record(rows)
        watching = want_hidden or want_attentions
        layers = None if watching else plan_of(self, found, _layer_weights)
        if layers is not None:
            run = self.frozen or encode_layers
            if self.graphs is None:
                rows = run(rows, batch, layers)
            else:
                rows = self.graphs(rows, batch, layers, run)
        else:
            # transformers' recorders would see packed rows; the call records what is wanted itself.
            token = _active_collector.set({})
            try:
                rows = self.encoder(rows, attention_mask=call).last_hidden_state
            finally:
                _active_collector.reset(token)
        last, pooled = call.hidden_states[-1] if want_hidden else None, None
        if last is None and not as_rows:
            last = call.padded(rows)
        if self.pooler is not None:
            pooled = self.pooler(call.whole(last, rows) if foreign else call.first(last, rows))
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=rows if as_rows else last, pooler_output=pooled
        )
        if want_hidden:
            output["hidden_states"] = tuple(call.hidden_states)
        if want_attentions:
            output["attentions"] = tuple(call.attentions)
            output["cross_attentions"] = ()
        if as_rows:
            output.call = call
        return_dict = kwargs.get("return_dict")
        return_dict = config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()
