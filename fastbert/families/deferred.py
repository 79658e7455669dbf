"""Model outputs whose logits are computed when somebody looks at them.

In training the masked-LM loss needs the logits of labelled tokens only, a chunk at a time. A loop
that also reads ``outputs.logits`` gets them, with their gradient, for what they cost.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput
from transformers.utils import ModelOutput

__all__ = ["DeferredMaskedLMOutput", "DeferredPreTrainingOutput"]


class _Deferred(ModelOutput):
    """A ModelOutput with one field that `defer` leaves for later; comes first among the bases."""

    _field = ""

    def defer(self, compute: Callable[[], Tensor], weight: Tensor) -> _Deferred:
        """Compute the field by this function, as long as ``weight`` is what it is now."""
        object.__setattr__(self, "_later", (compute, weight, weight._version))
        return self

    def _fill_in(self) -> None:
        attributes = object.__getattribute__(self, "__dict__")
        later = attributes.pop("_later", None)
        if later is None:
            return
        field = type(self)._field
        if attributes.get(field) is not None:
            return
        compute, weight, version = later
        if weight._version != version:
            attributes["_later"] = later
            raise RuntimeError(
                f"{field}: the weights have changed since this output was made. In training only "
                f"labelled tokens go through the head and other logits are computed on demand: "
                f"read outputs.{field} before optimizer.step()"
            )
        behind = [key for key in self.keys() if key != "loss"]
        self[field] = compute()
        for key in behind:  # the order that to_tuple() gives
            self.move_to_end(key)

    def __getattribute__(self, name: str):
        if name == type(self)._field:
            self._fill_in()
        return super().__getattribute__(name)

    def __getitem__(self, key):
        if key == type(self)._field or not isinstance(key, str):
            self._fill_in()
        return super().__getitem__(key)

    def __reduce__(self):
        self._fill_in()
        return super().__reduce__()

    def to_tuple(self) -> tuple:
        """All that is not None, in order, with the deferred field."""
        self._fill_in()
        return super().to_tuple()


class DeferredMaskedLMOutput(_Deferred, MaskedLMOutput):
    """`MaskedLMOutput` with its logits on demand."""

    _field = "logits"


class DeferredPreTrainingOutput(_Deferred, BertForPreTrainingOutput):
    """`BertForPreTrainingOutput` with its prediction logits on demand."""

    _field = "prediction_logits"
