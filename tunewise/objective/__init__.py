"""Objectives: losses and how they are weighed."""
