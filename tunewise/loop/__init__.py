"""Loops: in which stages a run goes."""
