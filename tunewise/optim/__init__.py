"""Optimizers: how a loss becomes a step."""
