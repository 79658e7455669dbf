"""Training on packed tokens: samplers, collators and masking for anybody's loop or Trainer, and
corpora of text for pre-training."""

from .collating import PackedCollator
from .corpus import Corpus
from .masking import Masking
from .sampling import TokenBudgetSampler
from .segments import SegmentDataset, draw

__all__ = [
    "Corpus",
    "Masking",
    "PackedCollator",
    "SegmentDataset",
    "TokenBudgetSampler",
    "draw",
]
