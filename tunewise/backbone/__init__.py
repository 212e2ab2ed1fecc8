"""Backbones: how the model that is adapted is loaded and prepared."""

from .load import backbone_config, load, renew
from .source import fetch

__all__ = ["backbone_config", "fetch", "load", "renew"]
