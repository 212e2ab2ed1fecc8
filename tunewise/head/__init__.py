"""Heads: how the answer is read out of a model's outputs."""

from .base import AUTO, Head
from .classification import ClassHead
from .cloze import ClozeHead
from .copilot import Copilot
from .gap import GapHead
from .image import GivenHead, ImageHead
from .instruct import InstructHead
from .language import LMHead
from .layers import LayersHead
from .pooled import PooledHead, pool
from .probed import ProbedHead

__all__ = [
    "AUTO",
    "ClassHead",
    "ClozeHead",
    "Copilot",
    "GapHead",
    "GivenHead",
    "Head",
    "ImageHead",
    "InstructHead",
    "LMHead",
    "LayersHead",
    "PooledHead",
    "ProbedHead",
    "pool",
]
