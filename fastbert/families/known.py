"""Who may be handed packed rows: the one list of known modules.

Packed rows ``[T, E]`` are the same to a module as a batch ``[B, S, E]`` only if it works on each
row alone. That is known of the ``forward`` functions listed here, if everything inside has one of
them too. A module of one's own, a subclass with a ``forward``, a ``forward`` that somebody
patched, on an instance or on the class, is not known: it gets what transformers would give it, or
the whole call runs transformers' code. A family's own classes are made known by `learn`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import repeat
from operator import is_, itemgetter
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers.activations
import transformers.pytorch_utils
from torch import nn

__all__ = [
    "Looked",
    "copies",
    "is_own",
    "learn",
    "own_forward",
    "patched",
    "plain",
    "row_wise",
    "untouched",
    "unwrapped",
    "user_hook",
    "watched",
]

# Each works on the last dimension alone, or element by element.
_ROW_WISE = (
    nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.Dropout, nn.Identity, nn.Sequential,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Tanhshrink, nn.Softshrink,
    nn.Hardshrink, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Threshold,
    transformers.pytorch_utils.Conv1D,
)  # fmt: skip
_ACTIVATIONS = tuple(
    cls
    for cls in vars(transformers.activations).values()
    if isinstance(cls, type) and issubclass(cls, nn.Module)
)
_FORWARDS = {cls.forward for cls in (*_ROW_WISE, *_ACTIVATIONS)}
# Never called themselves; only what is inside them is.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# Libraries whose layers stand in a linear layer's or an embedding's place and work row by row.
_LIBRARIES = (
    "bitsandbytes.nn.",
    "peft.tuners.",
    "peft.utils.",
    "torchao.",
    "transformers.integrations.",
)
# But these: how they quantise a row depends on the others. (torch.ao's dynamic linears do as well.)
_COUPLED = ("Linear8bitLt",)
_FUNCTIONS = (F.gelu, F.relu, F.silu, F.mish, F.elu, torch.tanh, torch.relu, torch.sigmoid)
# Hooks of libraries that work by wrapping layers; they neither look at shapes nor change values.
_HOOKS = (
    "accelerate.",
    "peft.",
    "torch.distributed.",
    "torch.nn.utils.",
    "transformers.modeling_utils",
    "transformers.utils.output_capturing",
)
# What a subclass may define without changing what a call computes.
_HARMLESS = frozenset(
    ("__init__", "__repr__", "_init_weights", "extra_repr", "from_pretrained", "post_init",
     "prepare_inputs_for_generation", "save_pretrained", "__reduce__")
)  # fmt: skip


class _Code(NamedTuple):
    """Functions as they were when they were first looked at, one behind the other.

    Attributes:
        owners: classes, or a module, whose attributes of these names they are.
        functions: None for one that was replaced before.
    """

    owners: tuple[Any, ...]
    names: tuple[str, ...]
    functions: tuple[FunctionType | None, ...]

    def same(self) -> bool:
        """Whether nobody has replaced any since."""
        return all(map(is_, map(getattr, self.owners, self.names, repeat(None)), self.functions))

    def of(self, classes: set[type]) -> _Code:
        """Without torch's layers and activations that none of these classes is or comes from."""
        used = {base for cls in classes for base in cls.__mro__}
        kept = [row for row in zip(*self, strict=True) if row not in _SHARED or row[0] in used]
        return _Code(*zip(*kept, strict=True))


# The code that this package stands in for: that of torch's layers, and of each module of
# transformers that has a family.
_SHARED = tuple((cls, "forward", cls.forward) for cls in (*_ROW_WISE, *_ACTIVATIONS))
_CODE: dict[ModuleType, _Code] = {}
_FORWARD_OF: dict[type, FunctionType] = {}
_EAGER = "eager_attention_forward"


def learn(code: ModuleType, row_wise: Iterable[type[nn.Module]]) -> None:
    """Make a module of transformers known.

    Args:
        row_wise: its classes that work on each row alone, if what is inside them does.
    """
    if code in _CODE:
        return
    classes = [
        v for v in vars(code).values()
        if isinstance(v, type) and v.__module__ == code.__name__ and issubclass(v, nn.Module)
    ]  # fmt: skip
    found = [
        # What is not transformers' own was replaced before.
        (cls, name, value if value.__module__ == code.__name__ else None)
        for cls in classes
        for name, value in vars(cls).items()
        if isinstance(value, FunctionType) and name not in _HARMLESS
    ]
    _FORWARD_OF.update({cls: function for cls, name, function in found if name == "forward"})
    _FORWARDS.update(cls.forward for cls in row_wise)
    if hasattr(code, _EAGER):
        found.append((code, _EAGER, getattr(code, _EAGER)))
    _CODE[code] = _Code(*zip(*found, *_SHARED, strict=True))


def patched(code: ModuleType) -> str | None:
    """What somebody replaced in a family's module or in torch's layers, or None."""
    for owner, name, function in zip(*_CODE[code], strict=True):
        if getattr(owner, name, None) is not function:
            where = "" if owner is code else f"{owner.__name__}."
            return f"{where}{name} was replaced"
    return None


def own_forward(cls: type[nn.Module]) -> bool:
    """Whether one of transformers' classes still has the forward that it had when imported."""
    return cls.forward is _FORWARD_OF[cls]


def _forward_is_known(cls: type[nn.Module]) -> bool:
    """Whether a class works on each row alone, if what is inside it does."""
    return cls.forward in _FORWARDS and cls.__call__ is nn.Module.__call__


# To a compiler these are constants, as the code of classes is to it: what they look through would
# be a thousand conditions to test in every call.
for _function in (patched, own_forward, _forward_is_known):
    _function._dynamo_marked_constant = True


_own: dict[tuple[type, type], bool] = {}


def is_own(cls: type, base: type) -> bool:
    """Whether a class computes what ``base`` computes: it is ``base``, or a subclass that overrides
    nothing a call depends on."""
    if cls is base:
        return True
    key = (cls, base)
    known = _own.get(key)
    if known is None:
        known = _own[key] = issubclass(cls, base) and not any(
            name not in _HARMLESS and hasattr(value, "__get__") and hasattr(base, name)
            for part in cls.__mro__
            if not issubclass(base, part) and not part.__module__.startswith("torch.distributed.")
            for name, value in vars(part).items()
            if name not in ("__dict__", "__weakref__")
        )
    return known


def unwrapped(module: nn.Module) -> nn.Module:
    """What is inside torch's wrapper for activation checkpointing, which hands on all it gets."""
    while (
        type(module).__name__ == "CheckpointWrapper"
        and type(module).__module__.startswith("torch.distributed.")
        and "forward" not in module.__dict__
    ):
        module = module._checkpoint_wrapped_module
    return module


def copies(module: nn.Module) -> list[nn.Module] | None:
    """What PEFT's wrapper for modules that are trained whole chooses from; None for another one."""
    if type(module).__name__ != "ModulesToSaveWrapper" or "forward" in module.__dict__:
        return None
    if not type(module).__module__.startswith("peft.") or user_hook(module):
        return None
    return [module.original_module, *module.modules_to_save.values()]


def untouched(module: nn.Module, base: type) -> bool:
    """Whether a call of this module is a call of ``base.forward``."""
    if type(module) is not base and not is_own(type(module), base):
        return False
    forward = module.__dict__.get("forward")
    return forward is None or _wrapped_by_accelerate(forward)


def _wrapped_by_accelerate(forward: Callable) -> bool:
    """accelerate moves weights to where they are needed, and calls what was there."""
    return getattr(getattr(forward, "func", None), "__module__", "").startswith("accelerate.")


def user_hook(module: nn.Module) -> bool:
    """Whether someone other than a known library wants to see this module's inputs or outputs."""
    every = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if not any(every):  # as almost always
        return False
    return any(
        not getattr(hook, "__module__", "").startswith(_HOOKS)
        for hooks in every
        for hook in hooks.values()
    )


def watched(module: nn.Module) -> bool:
    """Whether there is such a hook on a module or on anything inside it."""
    return any(map(user_hook, module.modules()))


def plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a call of this module is nothing but ``cls.forward``: no subclass, no hook."""
    return (
        type(module) is cls
        and "forward" not in module.__dict__
        and not module._forward_pre_hooks
        and not module._forward_hooks
    )


def row_wise(module: nn.Module | Callable) -> bool:
    """Whether packed rows may be handed to this module, an activation that is a function included:
    it and all that is inside it are known, and nobody watches."""
    if not isinstance(module, nn.Module):
        return any(module is function for function in _FUNCTIONS)
    if user_hook(module):
        return False
    if type(module) not in _CONTAINERS and not _works_by_row(module):
        return False
    return all(
        row_wise(child)
        for name, child in module._modules.items()
        if child is not None and name != "parametrizations"  # these work on weights, not on rows
    )


def _works_by_row(module: nn.Module) -> bool:
    """Whether a call of this module alone, whatever is inside it, is a known function."""
    cls = type(module)
    if cls.__module__.startswith(_LIBRARIES):
        known = cls.__name__ not in _COUPLED
    else:
        known = _forward_is_known(cls)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) != 1:
        return False  # it normalises over the sequence as well
    forward = module.__dict__.get("forward")
    return known and (forward is None or _wrapped_by_accelerate(forward))


_HOOKS_OF = itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
_CHILDREN_OF = itemgetter("_modules")


class Looked:
    """What was found out about the modules inside another one, for as long as they are the same.

    `still` compares what a module tree is made of with what was looked at: every module's class,
    children, hooks and own ``forward``, and the functions of their classes. Nothing can be changed,
    by whatever route, without one of these being another. A tree with hooks is never remembered.

    It is asked in every call, when no cache holds anything of the modules any more: what it costs
    is how many pieces of memory it looks at.

    Attributes:
        found: what was found out.
    """

    def __init__(self, root: nn.Module, found: Any, code: ModuleType):
        self.found = found
        self._children = dict(root._modules)
        self._modules = [m for child in root.children() for m in child.modules()]
        self._classes = list(map(type, self._modules))
        self._dicts = [m.__dict__ for m in self._modules]
        parents = [m for m in self._modules if m._modules]
        self._parents = [m.__dict__ for m in parents]
        self._children_of = [dict(m._modules) for m in parents]
        self._leaves = [m.__dict__ for m in self._modules if not m._modules]
        self._code = _CODE[code].of(set(self._classes))

    def still(self, root: nn.Module) -> bool:
        """Whether the modules inside ``root`` are those that were looked at, unwatched."""
        return (
            root._modules == self._children
            and list(map(type, self._modules)) == self._classes
            and not any(map(dict.__contains__, self._dicts, repeat("forward")))
            and not any(map(any, map(_HOOKS_OF, self._dicts)))
            and not any(map(_CHILDREN_OF, self._leaves))
            and list(map(_CHILDREN_OF, self._parents)) == self._children_of
            and self._code.same()
        )

    def __reduce__(self):
        return _nothing, ()  # a copy or an unpickled model looks for itself


def _nothing() -> None:
    return None
