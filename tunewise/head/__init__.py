"""Heads: how the answer is read out of a model's outputs."""

from .base import AUTO, Head
from .classification import ClassHead
from .cloze import ClozeHead
from .language import LMHead
from .pooled import PooledHead, pool

__all__ = ["AUTO", "ClassHead", "ClozeHead", "Head", "LMHead", "PooledHead", "pool"]
