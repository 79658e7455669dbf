"""What a family of models is, as data: the difference between its page and every other one.

Nothing outside a family's own page asks which family a model is of; what is asked is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["EmbeddingParts", "Family", "Head", "LayerParts", "VocabularyHead", "like_bert"]


@dataclass(frozen=True)
class LayerParts:
    """Where a layer keeps what it computes with: dotted names, from the layer on.

    Attributes:
        attention: has ``attention_head_size``, and may have ``scaling`` (or it is the usual one),
            ``is_causal`` and ``config``.
        query, key, value: its projections.
        attention_dropout, hidden_dropout, output_dropout: of the probabilities, and of what is
            added to the residual behind attention and behind the feed-forward part; None for none.
        attention_output, attention_norm: behind attention, where the norm comes behind what is
            added up; with ``pre_norm`` it is in front of attention.
        intermediate, activation, output, output_norm: the feed-forward part, likewise.
        pre_norm: where the norms are.
        chunks: what has ``chunk_size_feed_forward``; "" for the layer.
    """

    attention: str = "attention.self"
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    attention_dropout: str = "attention.self.dropout"
    attention_output: str = "attention.output.dense"
    hidden_dropout: str | None = "attention.output.dropout"
    attention_norm: str = "attention.output.LayerNorm"
    intermediate: str = "intermediate.dense"
    activation: str = "intermediate.intermediate_act_fn"
    output: str = "output.dense"
    output_dropout: str | None = "output.dropout"
    output_norm: str = "output.LayerNorm"
    chunks: str = ""
    pre_norm: bool = False

    _places: dict[str, str] = field(init=False, repr=False, compare=False)
    # The way to each owner, and what it holds: names here and there.
    _steps: list[tuple[list[str], list[tuple[str, str]]]] = field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self):  # at once: a compiler cannot follow what is found out later and kept
        settings = ("chunks", "pre_norm", "_places", "_steps")
        names = (name for name in self.__dataclass_fields__ if name not in settings)
        places = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        by_owner: dict[str, list[tuple[str, str]]] = {}
        for name, path in places.items():
            owner, _, last = path.rpartition(".")
            by_owner.setdefault(owner, []).append((name, last))
        steps = [(owner.split(".") if owner else [], held) for owner, held in by_owner.items()]
        object.__setattr__(self, "_places", places)
        object.__setattr__(self, "_steps", steps)

    def of(self, layer: nn.Module) -> dict[str, Any]:
        """The parts of a layer, under the names above."""
        found = {}
        for steps, held in self._steps:  # plain loops, which a compiler can follow
            owner = layer
            for step in steps:
                owner = getattr(owner, step)
            for name, last in held:
                found[name] = getattr(owner, last)
        return found

    def chunks_of(self, layer: nn.Module) -> nn.Module:
        """What has ``chunk_size_feed_forward``."""
        return layer.get_submodule(self.chunks)

    def inside(self, owner: str) -> dict[str, str]:
        """What an owner, a dotted name from the layer on, holds itself: names there and here."""
        found = {}
        for part, path in self._places.items():
            if part != "attention" and path.rpartition(".")[0] == owner:
                found[path.rpartition(".")[2]] = part
        return found


FurtherSum = Callable[
    [nn.Module, Mapping[str, Any], Callable[[Tensor], Tensor], torch.device], Tensor | None
]


def _nothing_further(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class EmbeddingParts:
    """What is summed up for a token, and where it is: names in the embeddings.

    Attributes:
        word, position, token_type: tables; a family may have no token types.
        further: names of more tables; a model may be without.
        further_inputs: arguments of a call that these are read with.
        further_sum: what these give: from the embeddings, the arguments of a call by name, what
            packs one of them, ``[1 or B, S, ...]``, and where ids are; ``[T or 1, E]``, or None.
        norm, dropout: behind the sum; a family may have no norm there.
        counts_tokens: positions of who gives none count the tokens that are not ``padding_idx``,
            from behind it on, as fairseq does; otherwise columns, from 0 on.
        projection: a dotted name in the model, from the width of the embeddings to that of the
            layers; where both are the same it may be missing.
    """

    word: str = "word_embeddings"
    position: str = "position_embeddings"
    token_type: str | None = "token_type_embeddings"
    further: tuple[str, ...] = ()
    further_inputs: tuple[str, ...] = ()
    further_sum: FurtherSum = _nothing_further
    norm: str | None = "LayerNorm"
    dropout: str = "dropout"
    counts_tokens: bool = False
    projection: str | None = None

    def modules_of(self, embeddings: nn.Module) -> list[str]:
        """Names of all of them that there are."""
        names = (
            self.word, self.position, self.token_type, *self.further, self.norm, self.dropout
        )  # fmt: skip
        return [name for name in names if name is not None and hasattr(embeddings, name)]

    def first_position(self, embeddings: nn.Module) -> int:
        """Of a sequence."""
        return embeddings.padding_idx + 1 if self.counts_tokens else 0


def _own_list(model: nn.Module) -> list[nn.Module]:
    """The layers of an encoder that has a list of them."""
    return model.encoder.layer


def _one_holder(model: nn.Module) -> list[tuple[nn.Module, type]]:
    return [(model.encoder.layer, nn.ModuleList)]


def _pooled(model: nn.Module, hidden: Tensor) -> Tensor:
    return model.pooler(hidden)


@dataclass(frozen=True)
class VocabularyHead:
    """Where a masked-LM model keeps its head: dotted names, from the model on.

    Attributes:
        modules: what is called on hidden states, one behind the other.
        owners: classes of what the parts are in, where the head is transformers' own.
        dense, activation, norm, decoder: what it consists of; an activation may be a function's
            name instead.
    """

    modules: tuple[str, ...]
    owners: Mapping[str, type[nn.Module]]
    dense: str
    norm: str
    decoder: str
    activation: str | None = None
    activation_name: str | None = None


@dataclass(frozen=True)
class Head:
    """How a class of transformers runs packed.

    Attributes:
        kind: a class of `fastbert.families.heads` or `fastbert.families.masked_lm`.
        settings: its attributes for this family.
    """

    kind: type
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """What is known of a family.

    Attributes:
        model_type: its name in configurations.
        code: transformers' module.
        config, model, embeddings, encoder, layer, pooler: transformers' classes; a family may have
            no pooler.
        output: of the model.
        heads: by the names of transformers' classes.
        owners: classes of what a layer consists of, by dotted names; an owner before what is in it.
        row_wise: further classes that work on each row alone: parts of heads.
        parts, sums: where a layer and the embeddings keep what they compute with.
        encoder_in: the encoder's name in the model.
        layers: of a model, in the order in which they run, which may have one several times.
        holders: modules between the encoder and its layers, with their classes.
        pool: from the model and hidden states ``[B, S, E]``, of which column 0 is read.
        calls_layers: the encoder's own loop cannot be given packed rows, and is left out.
        watched: parts of the encoder beside its layers.
        final_norm: behind the last layer, a dotted name in the model; or None.
        score_bias: what is added to the scores of all layers: from the model and the longest
            sequence's length, ``[H, S, S]``; it depends on places in the sequence alone.
    """

    model_type: str
    code: ModuleType
    config: type
    model: type[nn.Module]
    embeddings: type[nn.Module]
    encoder: type[nn.Module]
    layer: type[nn.Module]
    pooler: type[nn.Module] | None
    output: type
    heads: Mapping[str, Head]
    owners: Mapping[str, type[nn.Module]]
    row_wise: tuple[type[nn.Module], ...] = ()
    parts: LayerParts = LayerParts()
    sums: EmbeddingParts = EmbeddingParts()
    encoder_in: str = "encoder"
    layers: Callable[[nn.Module], Sequence[nn.Module]] = _own_list
    holders: Callable[[nn.Module], list[tuple[nn.Module, type]]] = _one_holder
    pool: Callable[[nn.Module, Tensor], Tensor] = _pooled
    calls_layers: bool = False
    watched: tuple[str, ...] = ()
    final_norm: str | None = None
    score_bias: Callable[[nn.Module, int], Tensor] | None = None

    def max_length(self, config: Any) -> int:
        """Tokens of a sequence at most: positions that a model of this configuration knows."""
        first = config.pad_token_id + 1 if self.sums.counts_tokens else 0
        return config.max_position_embeddings - first

    def encoder_of(self, model: nn.Module) -> nn.Module:
        """What calls the layers."""
        return getattr(model, self.encoder_in)

    def projection_of(self, model: nn.Module) -> nn.Module | None:
        """What is between the embeddings and the layers, if it is there."""
        owner, _, name = (self.sums.projection or "").rpartition(".")
        return getattr(model.get_submodule(owner), name, None) if name else None


def like_bert(model_type: str, code: ModuleType, prefix: str, **different: Any) -> Family:
    """A family whose layers are built as BERT's are, under names that begin with ``prefix``.

    Args:
        different: attributes of `Family` that are not as for BERT.
    """

    def named(rest: str) -> Any:
        return getattr(code, prefix + rest, None)

    owners = {
        "attention": named("Attention"),
        "attention.self": named("SelfAttention"),
        "attention.output": named("SelfOutput"),
        "intermediate": named("Intermediate"),
        "output": named("Output"),
    }
    known = {
        "config": named("Config"),
        "model": named("Model"),
        "embeddings": named("Embeddings"),
        "encoder": named("Encoder"),
        "layer": named("Layer"),
        "pooler": named("Pooler"),
        "owners": owners,
    }
    return Family(model_type, code, **{**known, **different})
