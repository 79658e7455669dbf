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


def _buckets_of(encoder: nn.Module, length: int, device: torch.device) -> Tensor:
    """``[2 S - 1]``: the row of the table for every distance from 1 - S on.

    Ten operations that follow from the length alone, so they run once for each.
    """

    def find() -> Tensor:
        distances = torch.arange(1 - length, length, device=device)
        return encoder.relative_position_bucket(distances, num_buckets=32)

    on_gpu = device.type == "cuda"
    if torch.compiler.is_compiling() or (on_gpu and torch.cuda.is_current_stream_capturing()):
        return find()
    key = type(encoder), length, device
    found = _buckets.get(key)
    if found is None:
        with torch.inference_mode(False):  # training will read it too
            found = find()
        if type(found) is Tensor:  # what traces has others
            if on_gpu:  # and other streams
                torch.cuda.current_stream(device).synchronize()
            _buckets[key] = found
    return found


def _score_bias(model: nn.Module, length: int) -> Tensor:
    """``[H, S, S]``: of every distance one number for each head, shared by all sequences."""
    table = model.encoder.relative_attention_bias
    by_distance = table(_buckets_of(model.encoder, length, table.weight.device)).T.contiguous()
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
