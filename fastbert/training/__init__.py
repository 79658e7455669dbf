"""Training on packed tokens: samplers, collators and masking for anybody's loop or Trainer."""

from .collating import PackedCollator, check_packs
from .masking import Masking
from .sampling import TokenBudgetSampler

__all__ = ["Masking", "PackedCollator", "TokenBudgetSampler", "check_packs"]
