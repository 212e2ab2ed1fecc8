"""Backbones: how the model that is adapted is loaded and prepared."""

from .load import backbone_config, load

__all__ = ["backbone_config", "load"]
