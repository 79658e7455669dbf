"""MPNet (Song et al., 2004.09297): all-mpnet-base and its kin. All layers add the same bias to
their scores, by the distance between two tokens."""

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.mpnet import modeling_mpnet as hf

from .family import EmbeddingParts, Family, Head, LayerParts, VocabularyHead
from .heads import MultipleChoiceHead, QuestionAnsweringHead, SequenceHead, TokenHead
from .masked_lm import MaskedLMHead

_VOCABULARY = VocabularyHead(
    modules=("lm_head",),
    owners={"lm_head": hf.MPNetLMHead},
    dense="lm_head.dense",
    activation_name="gelu",
    norm="lm_head.layer_norm",
    decoder="lm_head.decoder",
)


# By the class of an encoder, a length and a device.
_buckets: dict[tuple[type, int, torch.device], Tensor] = {}


def _find_buckets(encoder: nn.Module, length: int, device: torch.device) -> Tensor:
    distances = torch.arange(1 - length, length, device=device)
    return encoder.relative_position_bucket(distances, num_buckets=32)


def _buckets_of(encoder: nn.Module, length: int, weight: Tensor) -> Tensor:
    """``[2 S - 1]``: the row of the table ``weight`` for every distance from 1 - S on.

    Ten operations that follow from the length alone, so they run once for each.
    """
    device, on_gpu = weight.device, weight.is_cuda
    # Who traces wants to see them, with tensors of its own.
    traced = torch.compiler.is_compiling() or type(weight) not in (Tensor, nn.Parameter)
    if traced or (on_gpu and torch.cuda.is_current_stream_capturing()):
        return _find_buckets(encoder, length, device)
    key = type(encoder), length, device
    if key not in _buckets:
        with torch.inference_mode(False):  # training will read it too
            found = _find_buckets(encoder, length, device)
        if on_gpu:  # and other streams
            torch.cuda.current_stream(device).synchronize()
        _buckets[key] = found
    return _buckets[key]


def _score_bias(model: nn.Module, length: int) -> Tensor:
    """``[H, S, S]``: of every distance one number for each head, shared by all sequences."""
    table = model.encoder.relative_attention_bias
    by_distance = table(_buckets_of(model.encoder, length, table.weight)).T.contiguous()
    # Row i is the window of distances -i to S - 1 - i, and contiguous since the distances are.
    return by_distance.unfold(1, length, 1).flip(1)


FAMILY = Family(
    "mpnet",
    hf,
    config=hf.MPNetConfig,
    model=hf.MPNetModel,
    embeddings=hf.MPNetEmbeddings,
    encoder=hf.MPNetEncoder,
    layer=hf.MPNetLayer,
    pooler=hf.MPNetPooler,
    output=BaseModelOutputWithPooling,
    heads={
        "MPNetForMaskedLM": Head(MaskedLMHead, {"vocabulary": _VOCABULARY}),
        "MPNetForSequenceClassification": Head(
            SequenceHead, {"first": {"classifier": hf.MPNetClassificationHead}}
        ),
        "MPNetForMultipleChoice": Head(MultipleChoiceHead),
        "MPNetForTokenClassification": Head(TokenHead),
        "MPNetForQuestionAnswering": Head(QuestionAnsweringHead),
    },
    owners={
        "attention": hf.MPNetAttention,
        "attention.attn": hf.MPNetSelfAttention,
        "intermediate": hf.MPNetIntermediate,
        "output": hf.MPNetOutput,
    },
    row_wise=(hf.MPNetLMHead,),
    parts=LayerParts(
        attention="attention.attn",
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        attention_dropout="attention.attn.dropout",
        attention_output="attention.attn.o",
        hidden_dropout="attention.dropout",
        attention_norm="attention.LayerNorm",
    ),
    sums=EmbeddingParts(token_type=None, counts_tokens=True),
    calls_layers=True,
    watched=("relative_attention_bias",),
    score_bias=_score_bias,
)
