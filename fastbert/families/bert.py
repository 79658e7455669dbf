"""BERT's model and layer as drop-in classes, and where transformers keeps a layer's weights.

Each class is its transformers parent and nothing more until ``forward``: parameters, state-dict
names, saving and loading are the parent's. `BertModel.forward` decides once per call. On the
packed path it packs the batch, runs transformers' own encoder loop with a `_Call` where the
attention mask would be, and unpacks; `BertLayer.forward` sees the `_Call` and computes the layer
on packed rows. Any other call goes to transformers' code, unchanged.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.models.bert import modeling_bert as hf
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import _active_collector

from ..encoder import LayerWeights, attention_weights, encode_layer
from ..packing import PackedBatch, PaddedBatch
from . import modules
from .bert_inputs import check_inputs, embed_rows, make_batch
from .drop_in import DropIn, twin

__all__ = ["BertLayer", "BertModel", "obstacle"]

_log = logging.getLogger("fastbert")
_said: set[str] = set()
_ATTENTION_LIBRARY = ("eager", "sdpa", "flex_attention", "flash_attention")


class _Call(NamedTuple):
    """What one packed forward pass hands to every layer."""

    batch: PackedBatch | PaddedBatch
    hidden_states: list[Tensor] | None
    attentions: list[Tensor] | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> _Call:
        """For models that are spread over several devices: accelerate's hooks call it."""
        return self._replace(batch=self.batch.to(device, non_blocking=non_blocking))


@twin
class BertLayer(hf.BertLayer):
    """transformers' layer, which also takes packed rows ``[T, E]`` with a `_Call` as its mask."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | _Call | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        if not isinstance(attention_mask, _Call):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                past_key_values,
                **kwargs,
            )
        call, weights = attention_mask, _layer_weights(self)
        if call.attentions is not None:
            call.attentions.append(attention_weights(hidden_states, call.batch, weights))
        hidden_states = encode_layer(hidden_states, call.batch, weights)
        if call.hidden_states is not None:
            call.hidden_states.append(hidden_states)
        return hidden_states


def _layer_weights(layer: hf.BertLayer) -> LayerWeights:
    attention, intermediate, output = layer.attention, layer.intermediate, layer.output
    heads, mixed = attention.self, attention.output
    qkv = tuple(modules.projection(m) for m in (heads.query, heads.key, heads.value))
    return LayerWeights(
        qkv=modules.fuse(qkv),
        attention_output=modules.projection(mixed.dense),
        attention_norm=modules.norm(mixed.LayerNorm),
        intermediate=modules.projection(intermediate.dense),
        activation=modules.activation_name(intermediate.intermediate_act_fn),
        output=modules.projection(output.dense),
        output_norm=modules.norm(output.LayerNorm),
        head_size=heads.attention_head_size,
        scale=heads.scaling,
        attention_dropout=modules.dropout_p(heads.dropout) or 0.0,
        hidden_dropout=modules.dropout_p(mixed.dropout) or 0.0,
        output_dropout=modules.dropout_p(output.dropout) or 0.0,
    )


def _layer_obstacle(layer: nn.Module) -> str | None:
    """Why this layer cannot take packed rows, or None. Runs before every call: it must be quick."""
    if not isinstance(layer, BertLayer):
        return f"a layer is a {type(layer).__name__}, not a BertLayer"
    if "forward" in layer.__dict__ and not hasattr(layer, "_hf_hook"):  # accelerate's is known
        return "the forward of a layer was replaced"
    if layer.chunk_size_feed_forward:
        return "config.chunk_size_feed_forward is set"
    if modules.has_user_hooks(layer):
        return "a layer has a hook"
    attention = layer.attention
    heads = attention.self
    for owner, cls in (
        (attention, hf.BertAttention),
        (heads, hf.BertSelfAttention),
        (attention.output, hf.BertSelfOutput),
        (layer.intermediate, hf.BertIntermediate),
        (layer.output, hf.BertOutput),
    ):
        if type(owner) is not cls or "forward" in owner.__dict__:
            return f"a {cls.__name__} was replaced by a {type(owner).__name__}"
        if modules.has_user_hooks(owner):
            return f"a {cls.__name__} has a hook"
        for name, child in owner._modules.items():
            if modules.has_user_hooks(child):
                return f"{cls.__name__}.{name} has a hook"
            if name == "dropout" and modules.dropout_p(child) is None:
                return f"{cls.__name__}.dropout was replaced by a {type(child).__name__}"
    if heads.is_causal:
        return "the attention of a layer is causal (is_causal)"
    if not isinstance(heads.scaling, float | int):
        return f"the scaling of a layer is a {type(heads.scaling).__name__}"
    return None


def obstacle(model: hf.BertModel) -> str | None:
    """Why calls of this model run transformers' own code, or None if they can be packed."""
    config = model.config
    if config.is_decoder:
        return "decoder mode (config.is_decoder) is not packed"
    if getattr(config, "is_causal", None):
        return "causal attention (config.is_causal) is not packed"
    implementation = config._attn_implementation
    if implementation is not None and not implementation.startswith(_ATTENTION_LIBRARY):
        return f"the attention was replaced (attn_implementation={implementation!r})"
    encoder, embeddings = model.encoder, model.embeddings
    for owner, cls in ((encoder, hf.BertEncoder), (embeddings, hf.BertEmbeddings)):
        if type(owner) is not cls or "forward" in owner.__dict__:
            return f"the {cls.__name__} was replaced by a {type(owner).__name__}"
        if modules.has_user_hooks(owner):
            return f"the {cls.__name__} has a hook"
    for name, child in embeddings._modules.items():
        if modules.has_user_hooks(child):
            return f"BertEmbeddings.{name} has a hook"
    if model.pooler is not None and modules.has_user_hooks(model.pooler):
        return "the BertPooler has a hook"
    if modules.dropout_p(embeddings.dropout) is None:
        return "the dropout of the embeddings was replaced"
    for layer in encoder.layer:
        reason = _layer_obstacle(layer)
        if reason is not None:
            return reason
    return None


def _say_once(reason: str) -> None:
    if torch.compiler.is_compiling() or reason in _said:
        return
    _said.add(reason)
    _log.warning("fastbert runs transformers' own code for this call: %s", reason)


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
        as_rows = kwargs.pop("fastbert_rows", False)
        keep_padding = kwargs.pop("fastbert_keep_padding", False)
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
            reason = "decoder mode, cross-attention and caches are not packed"
        elif kwargs.get("is_causal"):
            reason = "causal attention (is_causal) is not packed"
        elif not isinstance(want_hidden, bool | None):
            reason = "output_hidden_states selects by index"
        elif kwargs.get("debug_io"):
            reason = "debug_io traces transformers' modules"
        else:
            reason = obstacle(self)
        if reason is not None:
            _say_once(reason)
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )

        # One row of ids for all sequences may come without its dimension.
        token_type_ids, position_ids = (
            ids[None] if ids is not None and ids.dim() == 1 else ids
            for ids in (token_type_ids, position_ids)
        )
        x = check_inputs(
            self, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        )
        batch = make_batch(self, x, attention_mask, position_ids, kwargs, keep_padding)
        rows = embed_rows(
            self.embeddings, batch, input_ids, token_type_ids, position_ids, inputs_embeds
        )
        call = _Call(batch, [rows] if want_hidden else None, [] if want_attentions else None)
        # transformers' recorders would see packed rows; the call records what is wanted itself.
        token = _active_collector.set({})
        try:
            rows = self.encoder(rows, attention_mask=call).last_hidden_state
        finally:
            _active_collector.reset(token)
        unpack = batch.view if keep_padding else batch.unpack
        pooled = None
        if self.pooler is not None:
            # Column 0 is all that the pooler reads.
            pooled = self.pooler(batch.first_rows(rows)[:, None])
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=rows if as_rows else unpack(rows), pooler_output=pooled
        )
        if want_hidden:
            output["hidden_states"] = (*map(unpack, call.hidden_states[:-1]), unpack(rows))
        if want_attentions:
            output["attentions"] = tuple(call.attentions)
            output["cross_attentions"] = ()
        if as_rows:
            output.batch = batch
        return_dict = kwargs.get("return_dict")
        return_dict = config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()
