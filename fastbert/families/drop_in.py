"""What every drop-in class is: its transformers parent, whose modules have packed twins."""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from ..frozen import Frozen
from ..graphs import CudaGraphs
from .borrowed import class_for
from .family import Family
from .in_flight import calling, is_inside
from .known import is_own

__all__ = [
    "DropIn",
    "check_config",
    "clear_options",
    "make_twin",
    "set_options",
    "to_twins",
    "twin_of",
]

# transformers' class -> the class that replaces it; families fill it with `make_twin`.
_TWINS: dict[type[nn.Module], type[nn.Module]] = {}


def make_twin(
    theirs: type[nn.Module],
    kind: type,
    *,
    name: str,
    module: str,
    family: Family,
    **settings: Any,
) -> type[nn.Module]:
    """A class whose instances can stand in the place of transformers'.

    Args:
        theirs: transformers' class.
        kind: how it runs packed; a ``run`` of it gets every call with its arguments by name.
        name, module: where the class can be found.
        family: whose class it is.
        settings: attributes of the class.
    """
    doc = f"``transformers.{theirs.__name__}``. {inspect.getdoc(kind)}"
    namespace = {"__module__": module, "__doc__": doc, "family": family, "theirs": theirs}
    if hasattr(kind, "run"):
        namespace["forward"] = _by_name(theirs, kind)
    _TWINS[theirs] = type(name, (kind, theirs), {**namespace, **settings})
    return _TWINS[theirs]


def _by_name(theirs: type[nn.Module], kind: type[DropIn]) -> Callable:
    """A forward with the signature of transformers' own, which tools read, and ``kind``'s further
    arguments."""
    signature = inspect.signature(theirs.forward)
    given = list(signature.parameters.values())
    names = [p.name for p in given[1:] if p.kind is p.POSITIONAL_OR_KEYWORD]
    further = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None)
               for n in kind.further_arguments]  # fmt: skip
    place = next((i for i, p in enumerate(given) if p.kind is p.VAR_KEYWORD), len(given))

    @wraps(theirs.forward)
    def forward(self, *args, **kwargs):
        if not torch.compiler.is_compiling() and not is_inside(self):
            # A call that began before this was the class: it is not known to be in flight.
            with calling(self):
                return self.forward(*args, **kwargs)
        inputs = dict(zip(names, args, strict=False))
        if len(args) > len(names) or any(name in kwargs for name in inputs):
            signature.bind(self, *args, **kwargs)  # raises what Python would
        inputs.update(kwargs)
        return_dict = inputs.pop("return_dict", None)
        output = kind.run(self, inputs)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict or isinstance(output, tuple) else output.to_tuple()

    forward.__signature__ = signature.replace(parameters=[*given[:place], *further, *given[place:]])
    return forward


def twin_of(cls: type[nn.Module]) -> type[nn.Module]:
    """The drop-in class of one of transformers' classes."""
    return _TWINS[cls]


class _MadeHere(type):
    """Type of the twins of somebody's subclass, which are made when they are needed."""


def _twin_for(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class that a module of this class gets, or None.

    A subclass of one of transformers' classes that computes the same gets a twin that is still a
    subclass of it.
    """
    if cls in _TWINS:
        return _TWINS[cls]
    if isinstance(cls, _MadeHere):
        return None
    for base, ours in list(_TWINS.items()):
        if issubclass(cls, base) and not issubclass(cls, ours) and is_own(cls, base):
            name, namespace = cls.__name__, {"__module__": cls.__module__, "__doc__": cls.__doc__}
            _TWINS[cls] = _MadeHere(name, (ours, cls), namespace)
            return _TWINS[cls]
    return None


def _made_again(ours: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """What `_twin_for` makes; reading ``ours`` has imported what that needs."""
    return _twin_for(cls)


# A class that is made here is pickled as what it is made of.
copyreg.pickle(_MadeHere, lambda made: (_made_again, made.__bases__))


def to_twins(model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
    """Give every module inside ``model``, itself included, the class of its drop-in twin.

    Returns:
        The modules that changed, with the class each had before.
    """
    changed = []
    for module in model.modules():
        cls = _twin_for(type(module))
        if cls is not None:
            changed.append((module, type(module)))
            module.__class__ = cls
            if isinstance(module, PreTrainedModel):
                # transformers looks up by class name what output_hidden_states may record.
                dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), module._can_record_outputs)
    return changed


class DropIn:
    """A transformers model that runs packed; comes first among the bases.

    Attributes:
        family, theirs: whose class it is, and in whose place.
        further_arguments: of a call, beside transformers'.
        padding: ``"zeros"``: hidden states at padding are zeros and nothing is computed there;
            ``"keep"``: they are computed, as in transformers.
        skip_logits: whether training with labels computes the logits of labelled tokens only and
            returns None in their place.
        graphs: what runs the layers in inference by CUDA graphs, or None.
        frozen: what runs them from copies of their weights, or None.
    """

    family: Family
    theirs: type[PreTrainedModel]
    further_arguments: tuple[str, ...] = ()
    padding = "zeros"
    skip_logits = False
    graphs: CudaGraphs | None = None
    frozen: Frozen | None = None
    _can_skip_logits = False  # whether there are logits over the vocabulary

    def __init__(
        self,
        config,
        *args,
        padding: str = "zeros",
        skip_logits: bool = False,
        cuda_graphs: bool = False,
        frozen: bool | str = False,
        **kwargs,
    ):
        if not isinstance(config, self.family.config):
            raise ValueError(
                f"fastbert: expected a transformers.{self.family.config.__name__}, got a "
                f"{type(config).__name__}"
            )
        check_config(config)
        super().__init__(config, *args, **kwargs)
        to_twins(self)
        set_options(
            self,
            padding=padding,
            skip_logits=skip_logits,
            cuda_graphs=cuda_graphs,
            frozen=frozen,
        )

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        with calling(self):
            if not isinstance(self, DropIn):  # undone between the lookup of this and here
                return self(*args, **kwargs)
            return super().__call__(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """transformers' ``from_pretrained``; pickled weights load only with
        ``use_safetensors=False``.

        A pickle can run code when it is opened, so asking for it is left to the caller. Beside
        transformers' arguments it takes the options of `fastbert.accelerate`: ``padding``,
        ``skip_logits``, ``cuda_graphs`` and ``frozen``.
        """
        _check_type(cls, pretrained_model_name_or_path, kwargs)
        kwargs.setdefault("use_safetensors", True)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


def set_options(
    model: nn.Module, *, padding: str, skip_logits: bool, cuda_graphs: bool, frozen: bool | str
) -> list[DropIn]:
    """Set what drop-in models inside ``model``, itself included, do otherwise than by default.

    Returns:
        The modules that were set; `clear_options` takes it back.

    Raises:
        ValueError: an unknown value, or an option that none of them has.
    """
    if padding not in ("zeros", "keep"):
        raise ValueError(f"padding: expected 'zeros' or 'keep', got {padding!r}")
    if frozen:
        Frozen(frozen)  # says what is wrong with it before anything is set
    inside = [m for m in model.modules() if isinstance(m, DropIn)]
    able = [m for m in inside if m._can_skip_logits]
    if skip_logits and not able:
        raise ValueError(
            "skip_logits: expected a model with a masked-LM head (as BertForMaskedLM has), "
            f"got a {type(model).__name__}, which has no logits over the "
            "vocabulary to leave out"
        )
    changed = []
    if skip_logits:
        for module in able:
            module.skip_logits = True
        changed += able
    if padding != DropIn.padding:
        for module in inside:
            module.padding = padding
        changed += inside
    if cuda_graphs:
        for module in inside:
            module.graphs = CudaGraphs()
        changed += inside
    if frozen:
        for module in inside:
            module.frozen = Frozen(frozen)
        changed += inside
    return changed


def clear_options(modules: list[DropIn]) -> None:
    """Back to the defaults."""
    for module in modules:
        if module.graphs is not None:
            module.graphs.forget()
        for name in ("padding", "skip_logits", "graphs", "frozen"):
            module.__dict__.pop(name, None)


def _check_type(cls: type[DropIn], source, kwargs: dict) -> None:
    """Refuse a checkpoint of another family, whose weights may well fit and compute nonsense.

    Raises:
        ValueError: another ``model_type``.
    """
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        kind = config.model_type
    else:
        kind = PreTrainedConfig.get_config_dict(config or source, **kwargs)[0].get("model_type")
    expected = cls.config_class.model_type
    if kind in (None, expected) or isinstance(config, cls.config_class):
        return
    from .registry import MODEL_TYPES  # which makes all the classes of this one

    library = "fastbert" if kind in MODEL_TYPES else "transformers"
    raise ValueError(
        f"{cls.__name__}: expected a checkpoint of type {expected!r}, got {kind!r} in {source!r}; "
        f"{library}.{class_for(cls.theirs.__name__, kind)} is the class for it"
    )


def check_config(config: PreTrainedConfig) -> None:
    """Refuse a config that asks for something that transformers 5 would silently leave out.

    Raises:
        NotImplementedError: relative position embeddings, which transformers 5 no longer has.
    """
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        raise NotImplementedError(
            "fastbert: expected config.position_embedding_type='absolute', got "
            f"{kind!r}. transformers 5 ignores this setting, so the model would compute something "
            "else than it was trained for."
        )
