"""Text from a masked language model: fill, draft, score. Described in ``docs/generation.md``."""

from .drafts import Draft, Template
from .filling import fill
from .masked import MaskedModel
from .sampling import Sampling
from .scoring import Scored, score
from .writing import gibbs, left_to_right, mask_predict

__all__ = [
    "Draft",
    "MaskedModel",
    "Sampling",
    "Scored",
    "Template",
    "fill",
    "gibbs",
    "left_to_right",
    "mask_predict",
    "score",
]
