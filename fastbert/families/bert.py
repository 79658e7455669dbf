"""BERT: its drop-in classes, and where transformers keeps what a packed layer needs.

Each class is its transformers parent and nothing more until ``forward``: parameters, state-dict
names, saving and loading are the parent's. `BertModel.forward` decides once per call. On the
packed path it packs the batch, runs transformers' own encoder loop with a `_Call` where the
attention mask would be, and unpacks; `BertLayer.forward` sees the `_Call` and computes the layer
on packed rows. Any other call goes to transformers' code, unchanged.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.bert import modeling_bert as hf
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .. import ops
from ..encoder import LayerWeights, attention_weights, encode_layer
from ..packing import PackedBatch, PaddedBatch
from . import modules

__all__ = [
    "ENCODER",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertLMHeadModel",
    "BertModel",
    "check_config",
    "obstacle",
    "to_twins",
]

_log = logging.getLogger("fastbert")
_said: set[str] = set()
_ATTENTION_LIBRARY = ("eager", "sdpa", "flex_attention", "flash_attention")


class _Call(NamedTuple):
    """What one packed forward pass hands to every layer."""

    batch: PackedBatch | PaddedBatch
    hidden_states: list[Tensor] | None
    attentions: list[Tensor] | None

    def to(self, device: torch.device | str, **kwargs: Any) -> _Call:
        return self._replace(batch=self.batch.to(device))


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
        attention_dropout=modules.dropout_p(heads.dropout) or 0.0,
        hidden_dropout=modules.dropout_p(mixed.dropout) or 0.0,
        output_dropout=modules.dropout_p(output.dropout) or 0.0,
    )


def _layer_obstacle(layer: nn.Module) -> str | None:
    """Why this layer cannot take packed rows, or None. Runs before every call: it must be quick."""
    if not isinstance(layer, BertLayer):
        return f"a layer is a {type(layer).__name__}, not a BertLayer"
    if layer.chunk_size_feed_forward:
        return "config.chunk_size_feed_forward is set"
    if modules.has_user_hooks(layer):
        return "a layer has a hook"
    attention = layer.attention
    for owner, cls in (
        (attention, hf.BertAttention),
        (attention.self, hf.BertSelfAttention),
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


def to_twins(model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
    """Give every BERT module inside ``model``, itself included, the class of its drop-in twin.

    Returns:
        The modules that changed, with the class each had before.
    """
    changed = []
    for module in model.modules():
        twin = TWINS.get(type(module))
        if twin is not None:
            changed.append((module, type(module)))
            module.__class__ = twin
            if isinstance(module, PreTrainedModel):
                # transformers looks up by class name what output_hidden_states may record.
                _CAN_RECORD_REGISTRY[module] = module._can_record_outputs
    return changed


def _say_once(reason: str) -> None:
    if torch.compiler.is_compiling() or reason in _said:
        return
    _said.add(reason)
    _log.warning("fastbert runs transformers' own code for this call: %s", reason)


class _DropIn:
    """A transformers model whose BERT runs packed; comes first among the bases."""

    def __init__(self, config, *args, **kwargs):
        check_config(config)
        super().__init__(config, *args, **kwargs)
        to_twins(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """transformers' ``from_pretrained``; pickled weights load only with
        ``use_safetensors=False``.

        A pickle can run code when it is opened, so asking for it is left to the caller.
        """
        kwargs.setdefault("use_safetensors", True)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


def check_config(config) -> None:
    """Refuse a config that asks for something BERT in transformers 5 would silently leave out.

    Raises:
        NotImplementedError: relative position embeddings, which transformers 5 no longer has for
        BERT.
    """
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        raise NotImplementedError(
            "fastbert: expected config.position_embedding_type='absolute', got "
            f"{kind!r}. transformers 5 ignores this setting for BERT, so the model would compute "
            "something else than it was trained for."
        )


class BertModel(_DropIn, hf.BertModel):
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
        elif want_hidden not in (True, False, None):
            reason = "output_hidden_states selects by index"
        elif kwargs.get("debug_io"):
            reason = "debug_io traces transformers' modules"
        else:
            reason = obstacle(self)
        if reason is not None:
            _say_once(reason)
            return super().forward(
                input_ids,
                attention_mask,
                token_type_ids,
                position_ids,
                inputs_embeds,
                encoder_hidden_states,
                encoder_attention_mask,
                past_key_values,
                use_cache,
                **kwargs,
            )

        x = _check_inputs(
            self, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        )
        batch = _batch(self, x, attention_mask, position_ids, kwargs, keep_padding)
        rows = _embed(
            self.embeddings, batch, input_ids, token_type_ids, position_ids, inputs_embeds
        )
        call = _Call(batch, [rows] if want_hidden else None, [] if want_attentions else None)
        rows = self.encoder(rows, attention_mask=call).last_hidden_state
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


def _check_inputs(
    model: BertModel,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> Tensor:
    """The input, ids ``[B, S]`` or embeddings ``[B, S, E]``, once it is known to fit."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    x = input_ids if inputs_embeds is None else inputs_embeds
    name, dims = ("input_ids", 2) if inputs_embeds is None else ("inputs_embeds", 3)
    if x.dim() != dims:
        axes = "[batch, length]" if dims == 2 else "[batch, length, hidden]"
        raise ValueError(f"BertModel: expected {name} {axes}, got {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(
            f"BertModel: expected at least one token, got {name} of shape {tuple(x.shape)}; "
            "leave empty batches out"
        )
    weight = model.embeddings.LayerNorm.weight
    if weight.device.type != "meta" and x.device != weight.device:
        raise ValueError(
            f"BertModel: expected {name} on {weight.device}, where the model is, got {x.device}"
        )
    shape = batch_size, length = x.shape[:2]
    if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape != shape:
        raise ValueError(
            f"BertModel: expected an attention_mask {tuple(shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    if attention_mask is not None and attention_mask.dim() not in (2, 4):
        raise ValueError(
            "BertModel: expected an attention_mask [batch, length] or "
            f"[batch, heads or 1, length, length], got {tuple(attention_mask.shape)}; "
            "a mask per query needs a dimension for the heads: mask[:, None]"
        )
    for other, ids in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
        if ids is not None and (
            ids.dim() != 2 or ids.shape[1] != length or batch_size % ids.shape[0]
        ):
            raise ValueError(f"BertModel: expected {other} {tuple(shape)}, got {tuple(ids.shape)}")
    positions = model.embeddings.position_embeddings.num_embeddings
    if position_ids is None and length > positions:
        raise ValueError(
            f"BertModel: expected at most {positions} tokens a sequence, the rows of the position "
            f"table, got {length}; truncate (tokenizer(..., truncation=True)) or split the text"
        )
    return x


def _batch(
    model: BertModel,
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    kwargs: dict[str, Any],
    keep_padding: bool,
) -> PackedBatch | PaddedBatch:
    """How this call's rows are laid out: packed, or padded where shapes may not depend on data."""
    shape = tuple(x.shape[:2])
    if attention_mask is not None and attention_mask.dim() == 4:
        return PaddedBatch(shape, bias=_bias(attention_mask, model.dtype))
    traced = (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or x.device.type == "meta"
        or type(x) not in (Tensor, nn.Parameter)
    )
    if traced or keep_padding:
        mask = None if attention_mask is None else attention_mask.to(x.device, torch.bool)
        return PaddedBatch(shape, key_mask=mask)
    if attention_mask is None:
        lengths = _packed_lengths(shape, position_ids, kwargs)
        if lengths is None:
            return PackedBatch.dense(*shape, x.device)
        return PackedBatch.from_lengths(lengths, x.device)
    batch = PackedBatch.from_mask(attention_mask, x.device)
    if model.pooler is not None and not batch.starts_real:
        # The pooler reads column 0, which is padding here: it has to be computed, as in
        # transformers.
        return PaddedBatch(shape, key_mask=attention_mask.to(x.device, torch.bool))
    return batch


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask per query as what is added to the scores."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
            ~mask, float("-inf")
        )
    if not mask.is_floating_point():
        raise ValueError(
            f"BertModel: expected a 4-D attention_mask in bool or floating point, got {mask.dtype}"
        )
    return mask.to(dtype)


def _packed_lengths(
    shape: tuple[int, int], position_ids: Tensor | None, kwargs: dict[str, Any]
) -> list[int] | None:
    """Sequences in a row that came packed: ``cu_seq_lens_q``, or positions that restart."""
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        if shape[0] != 1 or ends[0] != 0 or ends[-1] != shape[1] or sorted(ends) != ends:
            raise ValueError(
                "BertModel: expected cu_seq_lens_q to rise from 0 to the number of tokens of one "
                f"packed row, got {ends} for input of shape {shape}"
            )
        return [end - start for start, end in pairwise(ends)]
    if position_ids is None or shape[0] != 1:
        return None
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    if len(starts) < 2 or starts[0] != 0:
        return None
    return [end - start for start, end in zip(starts, [*starts[1:], shape[1]], strict=True)]


def _embed(
    embeddings: hf.BertEmbeddings,
    batch: PackedBatch | PaddedBatch,
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> Tensor:
    """The rows ``[T, E]`` that enter the first layer."""
    x = input_ids if inputs_embeds is None else inputs_embeds

    def rows(ids: Tensor) -> Tensor:
        return batch.pack(ids.expand(x.shape[0], -1) if ids.shape[0] == 1 else ids)

    positions = batch.columns(x.device) if position_ids is None else rows(position_ids)
    types = torch.zeros_like(positions) if token_type_ids is None else rows(token_type_ids)
    word, position, kind = (
        embeddings.word_embeddings,
        embeddings.position_embeddings,
        embeddings.token_type_embeddings,
    )
    norm = modules.norm(embeddings.LayerNorm)
    tables = (word, position, kind)
    if (
        inputs_embeds is None
        and isinstance(norm, tuple)
        and all(modules.is_plain_embedding(table) for table in tables)
        and not (torch.is_grad_enabled() and any(t.weight.requires_grad for t in tables))
    ):
        hidden = ops.embed(
            rows(input_ids), positions, types, *(t.weight for t in tables), *norm[:2], eps=norm.eps
        )
    else:
        # With gradients nn.Embedding is called: its padding_idx keeps a row of the table frozen.
        hidden = batch.pack(inputs_embeds) if input_ids is None else word(rows(input_ids))
        hidden = hidden + kind(types) + position(positions)
        if isinstance(norm, tuple):
            hidden = ops.layer_norm(hidden, norm.weight, norm.bias, eps=norm.eps)
        else:
            hidden = norm(hidden)
    return F.dropout(hidden, modules.dropout_p(embeddings.dropout) or 0.0)


def _labels_on_padding(labels: Tensor | None, attention_mask: Tensor | None) -> bool:
    """Whether a loss over padded positions is asked for, so that their hidden states matter."""
    if labels is None or attention_mask is None or attention_mask.dim() != 2:
        return False
    if torch.compiler.is_compiling():
        return True  # padding is kept then, so keeping it costs nothing
    return bool(((labels != -100) & (attention_mask.to(labels.device) == 0)).any())


class BertForPreTraining(_DropIn, hf.BertForPreTraining):
    """``transformers.BertForPreTraining``; the masked-LM head runs on real tokens only."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | hf.BertForPreTrainingOutput:
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs, batch = _encode_rows(self, inputs, labels, kwargs)
        rows, pooled = outputs[:2]
        scores, relation = self.cls(rows, pooled)
        loss = None
        if labels is not None and next_sentence_label is not None:
            loss = _token_loss(scores, batch, labels)
            loss = loss + F.cross_entropy(relation.view(-1, 2), next_sentence_label.view(-1))
        return hf.BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=_padded(scores, batch),
            seq_relationship_logits=relation,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class BertForMaskedLM(_DropIn, hf.BertForMaskedLM):
    """``transformers.BertForMaskedLM``; its head runs on real tokens, other logits are 0."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | MaskedLMOutput:
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        kwargs["encoder_hidden_states"] = encoder_hidden_states
        kwargs["encoder_attention_mask"] = encoder_attention_mask
        outputs, batch = _encode_rows(self, inputs, labels, kwargs)
        scores = self.cls(outputs[0])
        return MaskedLMOutput(
            loss=None if labels is None else _token_loss(scores, batch, labels),
            logits=_padded(scores, batch),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class BertForTokenClassification(_DropIn, hf.BertForTokenClassification):
    """``transformers.BertForTokenClassification``."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | TokenClassifierOutput:
        keep = _labels_on_padding(labels, attention_mask)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            fastbert_keep_padding=keep,
            **kwargs,
        )


class BertForQuestionAnswering(_DropIn, hf.BertForQuestionAnswering):
    """``transformers.BertForQuestionAnswering``; without labels, padding cannot be an answer.

    Start and end are chosen among all positions, so the logits of padding matter. Without labels
    they are the smallest finite number. With labels, transformers' loss has them in its softmax,
    so such a batch is computed with its padding.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor] | QuestionAnsweringModelOutput:
        with_labels = start_positions is not None and end_positions is not None
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            start_positions=start_positions,
            end_positions=end_positions,
            fastbert_keep_padding=with_labels,
            **kwargs,
        )
        if attention_mask is not None and attention_mask.dim() == 2 and not with_labels:
            padding = attention_mask.to(output.start_logits.device) == 0
            lowest = torch.finfo(output.start_logits.dtype).min
            output.start_logits = output.start_logits.masked_fill(padding, lowest)
            output.end_logits = output.end_logits.masked_fill(padding, lowest)
        return output


class BertForSequenceClassification(_DropIn, hf.BertForSequenceClassification):
    """``transformers.BertForSequenceClassification``."""


class BertForMultipleChoice(_DropIn, hf.BertForMultipleChoice):
    """``transformers.BertForMultipleChoice``; every choice is a sequence of its own length."""


class BertForNextSentencePrediction(_DropIn, hf.BertForNextSentencePrediction):
    """``transformers.BertForNextSentencePrediction``."""


class BertLMHeadModel(_DropIn, hf.BertLMHeadModel):
    """``transformers.BertLMHeadModel``; as a decoder it runs transformers' code."""


def _encode_rows(
    model: nn.Module,
    inputs: tuple[Tensor | None, ...],
    labels: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[BaseModelOutputWithPoolingAndCrossAttentions, PackedBatch | PaddedBatch | None]:
    """The output of ``model.bert`` with packed rows as its hidden state, and their batch.

    The batch is None, and the hidden state padded, where the base model ran transformers' code, or
    where someone watches the base model and has to see padded tensors.
    """
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
    bert = model.bert
    plain = isinstance(bert, BertModel) and not (
        modules.has_user_hooks(bert) or modules.has_user_hooks(model.cls)
    )
    options = {"fastbert_rows": True} if plain else {}
    if _labels_on_padding(labels, inputs[1]):
        options["fastbert_keep_padding"] = True
    outputs = bert(**dict(zip(names, inputs, strict=True)), return_dict=True, **options, **kwargs)
    return outputs, getattr(outputs, "batch", None)


def _token_loss(scores: Tensor, batch: PackedBatch | PaddedBatch | None, labels: Tensor) -> Tensor:
    """Cross-entropy over labelled tokens, from packed or padded scores."""
    labels = labels.to(scores.device)
    labels = labels.reshape(-1) if batch is None else batch.pack(labels)
    return F.cross_entropy(scores.view(-1, scores.shape[-1]), labels)


def _padded(scores: Tensor, batch: PackedBatch | PaddedBatch | None) -> Tensor:
    return scores if batch is None else batch.unpack(scores)


ENCODER = hf.BertModel
TWINS: dict[type[nn.Module], type[nn.Module]] = {
    hf.BertForMaskedLM: BertForMaskedLM,
    hf.BertForMultipleChoice: BertForMultipleChoice,
    hf.BertForNextSentencePrediction: BertForNextSentencePrediction,
    hf.BertForPreTraining: BertForPreTraining,
    hf.BertForQuestionAnswering: BertForQuestionAnswering,
    hf.BertForSequenceClassification: BertForSequenceClassification,
    hf.BertForTokenClassification: BertForTokenClassification,
    hf.BertLayer: BertLayer,
    hf.BertLMHeadModel: BertLMHeadModel,
    hf.BertModel: BertModel,
}
