"""The one list of families. A family's page is imported when one of its models is met."""

from __future__ import annotations

import importlib
import sys
import threading
from functools import cache
from typing import NamedTuple

from torch import nn

from . import known
from .drop_in import make_twin
from .family import Family
from .model import PackedLayer, PackedModel, arguments_not_packed

__all__ = ["MODEL_TYPES", "class_named", "class_names", "family_of", "head_class", "load"]

_MODELS = "fastbert.models"  # where the classes are found by their names


class _Listed(NamedTuple):
    """What is known before a page is imported.

    Attributes:
        prefix: of the names of transformers' classes.
        page: the file beside this one.
        code: transformers' module.
    """

    prefix: str
    page: str
    code: str


_LISTED = {
    "bert": _Listed("Bert", "bert", "bert.modeling_bert"),
    "roberta": _Listed("Roberta", "roberta", "roberta.modeling_roberta"),
    "xlm-roberta": _Listed("XLMRoberta", "xlm_roberta", "xlm_roberta.modeling_xlm_roberta"),
    "camembert": _Listed("Camembert", "camembert", "camembert.modeling_camembert"),
    "data2vec-text": _Listed("Data2VecText", "data2vec_text", "data2vec.modeling_data2vec_text"),
    "ernie": _Listed("Ernie", "ernie", "ernie.modeling_ernie"),
    "layoutlm": _Listed("LayoutLM", "layoutlm", "layoutlm.modeling_layoutlm"),
    "megatron-bert": _Listed(
        "MegatronBert", "megatron_bert", "megatron_bert.modeling_megatron_bert"
    ),
    "roberta-prelayernorm": _Listed(
        "RobertaPreLayerNorm",
        "roberta_prelayernorm",
        "roberta_prelayernorm.modeling_roberta_prelayernorm",
    ),
    "xlm-roberta-xl": _Listed(
        "XLMRobertaXL", "xlm_roberta_xl", "xlm_roberta_xl.modeling_xlm_roberta_xl"
    ),
    "electra": _Listed("Electra", "electra", "electra.modeling_electra"),
    "mpnet": _Listed("MPNet", "mpnet", "mpnet.modeling_mpnet"),
    "albert": _Listed("Albert", "albert", "albert.modeling_albert"),
    "bert-generation": _Listed(
        "BertGeneration", "bert_generation", "bert_generation.modeling_bert_generation"
    ),
    "distilbert": _Listed("DistilBert", "distilbert", "distilbert.modeling_distilbert"),
}
MODEL_TYPES = tuple(_LISTED)  # as configurations name families
_loading = threading.RLock()  # a family has one class for each of transformers'
_BY_CODE = {f"transformers.models.{each.code}": name for name, each in _LISTED.items()}


def load(model_type: str) -> Family:
    """A family, whose classes can be used from now on.

    Raises:
        KeyError: there is none of this name.
    """
    with _loading:
        return _load(model_type)


@cache
def _load(model_type: str) -> Family:
    page = importlib.import_module(f"{__package__}.{_LISTED[model_type].page}")
    family: Family = page.FAMILY
    known.learn(family.code, family.row_wise)
    settings = {"not_packed": arguments_not_packed(family)}
    kinds = {
        family.layer.__name__: (PackedLayer, {}),
        family.model.__name__: (PackedModel, settings),
    }
    kinds |= {name: (head.kind, head.settings) for name, head in family.heads.items()}
    models, prefix = importlib.import_module(_MODELS), _LISTED[model_type].prefix
    for theirs, (kind, settings) in kinds.items():
        name = theirs if theirs.startswith(prefix) else prefix + theirs
        cls = make_twin(
            getattr(family.code, theirs), kind, name=name, module=_MODELS, family=family, **settings
        )
        setattr(models, name, cls)
    return family


def family_of(cls: type[nn.Module]) -> Family | None:
    """The family that a class of a model, or a subclass of one, is of."""
    for base in cls.__mro__:
        name = _BY_CODE.get(base.__module__)
        if name is not None:
            return load(name)
    return None


def class_names() -> list[str]:
    """Of all drop-in classes of all families, which are loaded for that."""
    families = map(load, MODEL_TYPES)
    return sorted(name for f in families for name in (f.model.__name__, *f.heads))


def head_class(model_type: str, head: str) -> type[nn.Module] | None:
    """A family's class for a head, as in ``"ForMaskedLM"``, or None."""
    load(model_type)
    return vars(sys.modules[_MODELS]).get(f"{_LISTED[model_type].prefix}{head}")


def class_named(name: str) -> type[nn.Module] | None:
    """The drop-in class of this name, or None."""
    prefixes = [(len(each.prefix), model_type) for model_type, each in _LISTED.items()
                if name.startswith(each.prefix)]  # fmt: skip
    for _, model_type in sorted(prefixes, reverse=True)[:1]:
        load(model_type)
    return vars(sys.modules[_MODELS]).get(name) if prefixes else None
