"""Whether a call can be packed: what is read of the model's modules and settings before it.

A reason is a clause for the log. Everything here runs before every call, so it has to be quick:
what the modules are is remembered while they stay the same (`fastbert.families.known.Looked`).
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import known, modules
from .drop_in import twin_of
from .family import Family

__all__ = ["Found", "call_obstacle", "examine", "is_remembered", "obstacle", "say_once"]

_log = logging.getLogger("fastbert")
_said: set[str] = set()
_ATTENTION_LIBRARY = ("sdpa", "flex_attention", "flash_attention", "fastbert")
_ONLY_COUNT = {"torch.utils.module_tracker"}  # for FLOPs by module; what is called is no matter


def _part(owner: nn.Module, name: str, *children: str) -> str | None:
    """Why the named children of a part of transformers' model cannot take packed rows, or None."""
    if known.user_hook(owner):
        return f"{name} has a hook"
    for child in children:
        module = getattr(owner, child)
        if child.endswith("dropout"):
            if isinstance(module, nn.Module) and known.user_hook(module):
                return f"{name}.{child} has a hook"
            if modules.dropout_p(module) is None:
                return f"{name}.{child} was replaced by a {type(module).__name__}"
        elif not known.row_wise(module):
            if isinstance(module, nn.Module) and known.watched(module):
                return f"{name}.{child} has a hook"
            what = getattr(module, "__name__", type(module).__name__)
            return f"{name}.{child} is a {what}, which is not known to work row by row"
    return None


def _layer_obstacle(layer: nn.Module, family: Family) -> str | None:
    """Why the modules of this layer cannot take packed rows, or None."""
    outer, layer = layer, known.unwrapped(layer)
    name = family.layer.__name__
    if not known.untouched(layer, twin_of(family.layer)):
        return _replaced(layer, name)
    if known.user_hook(outer):
        return f"a {name} has a hook"
    for path, cls in {"": type(layer), **family.owners}.items():
        part = layer.get_submodule(path)
        if path and not known.untouched(part, cls):
            return _replaced(part, cls.__name__)
        reason = _part(part, cls.__name__ if path else f"a {name}", *family.parts.inside(path))
        if reason is not None:
            return reason
    return None


def _replaced(module: nn.Module, name: str) -> str:
    if "forward" in module.__dict__:
        return f"the forward of a {name} was replaced"
    return f"a {name} was replaced by a {type(module).__name__}"


def _module_obstacle(model: nn.Module, family: Family) -> str | None:
    """Why the modules inside this model cannot take packed rows, or None."""
    encoder, embeddings = family.encoder_of(model), model.embeddings
    for part, cls in ((encoder, family.encoder), (embeddings, family.embeddings)):
        if not known.untouched(part, cls):
            return _replaced(part, cls.__name__)
    reason = _part(encoder, family.encoder.__name__, *family.watched) or _part(
        embeddings, family.embeddings.__name__, *family.sums.modules_of(embeddings)
    )
    projection = family.projection_of(model)
    if reason is None and projection is not None:
        owner, _, name = family.sums.projection.rpartition(".")
        reason = _part(model.get_submodule(owner), family.model.__name__, name)
    if reason is None and family.final_norm is not None:
        owner, _, name = family.final_norm.rpartition(".")
        reason = _part(model.get_submodule(owner), family.model.__name__, name)
    for holder, cls in family.holders(model):
        if reason is None and not (type(holder) is cls and known.plain(holder, cls)):
            reason = f"the layers are in a {type(holder).__name__}, or it has a hook"
    for layer in dict.fromkeys(family.layers(model)):
        reason = reason or _layer_obstacle(layer, family)
    pooler = getattr(model, "pooler", None)
    watched = pooler is not None and known.watched(pooler)
    name = family.pooler.__name__ if watched else None
    return f"the {name} has a hook" if reason is None and watched else reason


class Found(NamedTuple):
    """What was found out about the modules of a model.

    Attributes:
        reason: why they cannot take packed rows, or None.
        pools_rows: whether the pooler can take the first row of each sequence alone.
        settings: for each layer the attributes of what may be cut in chunks, and of its attention.
    """

    reason: str | None
    pools_rows: bool
    settings: list[tuple[dict, dict]]


_LOOKED = "_fastbert_looked"


def _look(model: nn.Module, family: Family) -> Found:
    """Look at the modules of a model, unless they are those that were looked at last time."""
    compiling = torch.compiler.is_compiling()
    looked = None if compiling else model.__dict__.get(_LOOKED)
    if looked is not None and looked.still(model):
        return looked.found
    reason = known.patched(family.code) or _module_obstacle(model, family)
    pooler = getattr(model, "pooler", None)
    pools_rows = pooler is not None and _pools_rows(pooler, family)
    layers = [] if reason is not None else map(known.unwrapped, family.layers(model))
    parts, settings = family.parts, []
    for layer in layers:
        attention = layer.get_submodule(parts.attention)
        settings.append((parts.chunks_of(layer).__dict__, attention.__dict__))
    found = Found(reason, pools_rows, settings)
    if not compiling:
        looked = known.Looked(model, found, family.code)
        if looked.still(model):
            model.__dict__[_LOOKED] = looked
    return found


def is_remembered(model: nn.Module, found: Found) -> bool:
    """Whether this was found in a model that nobody watches: no other is remembered."""
    looked = model.__dict__.get(_LOOKED)
    return looked is not None and looked.found is found


def _pools_rows(pooler: nn.Module, family: Family) -> bool:
    """Whether a pooler looks at the first row alone: the family's, or PEFT's choice of such
    ones."""
    copies = known.copies(pooler)
    if copies is not None:
        return all(_pools_rows(copy, family) for copy in copies)
    return known.untouched(pooler, family.pooler) and all(map(known.row_wise, pooler.children()))


def _watched_by_all() -> str | None:
    """Hooks on every module of the process, which would see packed rows or nothing."""
    every = torch.nn.modules.module
    hooks = (
        every._global_forward_hooks,
        every._global_forward_pre_hooks,
        every._global_backward_hooks,
        every._global_backward_pre_hooks,
    )
    if not any(hooks):
        return None
    modules = {getattr(hook, "__module__", "") for kind in hooks for hook in kind.values()}
    if modules <= _ONLY_COUNT:
        return None
    return "there are hooks on every module (register_module_..._hook)"


def _attention_obstacle(config) -> str | None:
    implementation = config._attn_implementation
    if implementation is None or implementation == "eager":
        return None
    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    if implementation.startswith(_ATTENTION_LIBRARY) and (
        function is None or function.__module__.startswith(("transformers.", "fastbert."))
    ):
        return None
    return f"the attention was replaced (attn_implementation={implementation!r})"


def call_obstacle(kwargs: dict[str, Any]) -> str | None:
    """Why this call cannot be packed, whatever the model is, or None.

    Args:
        kwargs: what the call has beside the arguments of an encoder.
    """
    if kwargs.get("is_causal"):
        return "causal attention (is_causal) is not packed"
    if kwargs.get("debug_io"):
        return "debug_io traces transformers' modules"
    if torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing():
        return "torch.jit.trace records operations that depend on no data"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func runs"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation runs"
    return None


def examine(model: nn.Module) -> Found:
    """What is known of a drop-in model before a call: `Found`, with the reason why its calls run
    transformers' own code, or None."""
    config, family = model.config, model.family
    if getattr(config, "is_decoder", False):
        return _no("decoder mode (config.is_decoder) is not packed")
    if getattr(config, "is_causal", None):
        return _no("causal attention (config.is_causal) is not packed")
    reason = _attention_obstacle(config) or _watched_by_all()
    if reason is not None:
        return _no(reason)
    found = _look(model, family)
    for chunks, attention in found.settings:
        if chunks.get("chunk_size_feed_forward"):
            return _no("config.chunk_size_feed_forward is set")
        if attention.get("is_causal"):
            return _no("the attention of a layer is causal (is_causal)")
        scaling = attention.get("scaling", 1.0)
        if not isinstance(scaling, float | int):
            return _no(f"the scaling of a layer is a {type(scaling).__name__}")
    return found


def _no(reason: str) -> Found:
    return Found(reason, False, [])


def obstacle(model: nn.Module) -> str | None:
    """Why calls of this model run transformers' own code, or None if they can be packed."""
    return examine(model).reason


def say_once(message: str) -> None:
    """Log a warning, the first time."""
    if torch.compiler.is_compiling() or message in _said:
        return
    _said.add(message)
    _log.warning("fastbert %s", message)
