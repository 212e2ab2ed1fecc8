"""Starts of deltas: where the first values of a low-rank change come from."""
