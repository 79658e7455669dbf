"""fastbert: BERT-family encoders at the speed of the hardware, without changing what people write.

``from fastbert import BertModel`` in place of ``from transformers import BertModel``, or
``fastbert.accelerate(model)`` on a model that is already loaded.

Importing this package imports nothing else: names are resolved on first use. Names of transformers
that need no acceleration (``BertConfig``, ``BertTokenizer``, ``Trainer``) give its own objects.
"""

import importlib
import os.path

__version__ = "0.1.0"

_HOME = {
    "accelerate": "fastbert.acceleration",
    "backend": "fastbert.ops.backend",
    "register_attention": "fastbert.families.interface",
}
_MODULES = ("ops", "packing", "testing")

_ALWAYS = ["__version__", *_HOME, *_MODULES]

# The kernels live in the top-level folder kernels/ and are imported as fastbert.kernels. An
# installed package has them inside this folder; in a checkout the root is searched too, but only
# when the kernels there are ours (Hugging Face publishes a package named "kernels" as well).
_HERE = os.path.dirname(os.path.abspath(__file__))
_ROOT = os.path.dirname(_HERE)
if not os.path.isdir(os.path.join(_HERE, "kernels")) and os.path.isfile(
    os.path.join(_ROOT, "kernels", "_tiles.py")
):
    __path__.append(_ROOT)


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"fastbert.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name == "__all__":
        return sorted(
            [*_ALWAYS, *importlib.import_module("fastbert.families.registry").class_names()]
        )
    if name[:1].isupper() or name == "pipeline":  # what people import beside a model
        found = importlib.import_module("fastbert.families.registry").class_named(name)
        if found is not None:
            globals()[name] = found
            return found
        return importlib.import_module("fastbert.families.borrowed").from_transformers(name)
    raise AttributeError(f"module 'fastbert' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __getattr__("__all__")
