"""The drop-in classes, under the names that transformers gives them.

A name's family is loaded when the name is asked for (`fastbert.families.registry`).
"""

from .families import registry


def __getattr__(name: str) -> type:
    found = None if name.startswith("_") else registry.class_named(name)
    if found is None:
        raise AttributeError(f"module 'fastbert.models' has no attribute {name!r}")
    return found


def __dir__() -> list[str]:
    return registry.class_names()
