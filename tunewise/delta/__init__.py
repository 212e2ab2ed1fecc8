"""Deltas: trainable changes of the forward pass, one file per mechanism."""
