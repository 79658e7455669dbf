"""transformers' common tests as test cases, one for each family and package; see run.py."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
import unittest
from pathlib import Path

import torch
import transformers
from families import FAMILIES, Family, Tester, labels_for_pre_training
from run import NAME, fetch

import fastbert


def import_common(folder: Path) -> types.ModuleType:
    """``test_modeling_common``, with empty classes where it imports what was not shipped."""

    def module(name: str, **content) -> None:
        made = types.ModuleType(f"{NAME}.{name}" if name else NAME)
        made.__path__ = [str(folder / name)] if not content else []
        vars(made).update(content)
        sys.modules[made.__name__] = made

    module("")
    for package, file, cls in (
        ("exporters", "test_export", "ExportTesterMixin"),
        ("generation", "test_utils", "GenerationTesterMixin"),
    ):
        if not (folder / package).is_dir():
            module(package)
            module(f"{package}.{file}", **{cls: type(cls, (), {})})
    return importlib.import_module(f"{NAME}.test_modeling_common")


def make_case(name: str, family: Family, package: types.ModuleType) -> type:
    """The common tests for one family, over the classes of one package.

    Parts of a test are not reported one by one, there are 46,000: one that fails fails the test.
    """
    mixin = _COMMON.ModelTesterMixin

    def set_up(self) -> None:
        self.model_tester = Tester(family)

    def prepare(self, inputs, model_class, return_labels=False):
        if return_labels and model_class.__name__.endswith("ForPreTraining"):
            return labels_for_pre_training(inputs, self.model_tester, model_class)
        return mixin._prepare_for_class(self, inputs, model_class, return_labels)

    classes = tuple(getattr(package, name) for name in family.classes)
    members = {
        "setUp": set_up,
        "__module__": __name__,
        "_prepare_for_class": prepare,
        "subTest": lambda self, *args, **kwargs: contextlib.suppress(unittest.SkipTest),
        "all_model_classes": classes,
        **family.options,
    }
    writes = any(cls.can_generate() for cls in classes)
    bases = (mixin, *[_COMMON.GenerationTesterMixin] * writes, unittest.TestCase)
    return type(f"{package.__name__}_{name}", bases, members)


# A third of their slowest test went into messages, each of two tensors, that nobody sees.
torch.set_printoptions(threshold=0, edgeitems=1)
_COMMON = import_common(fetch())
for _name, _family in FAMILIES.items():
    for _package in (transformers, fastbert):
        globals()[f"{_package.__name__}_{_name}"] = make_case(_name, _family, _package)
