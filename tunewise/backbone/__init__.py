"""Backbones: how the model that is adapted is loaded and prepared."""

from .load import backbone_config, load, renew

__all__ = ["backbone_config", "load", "renew"]
