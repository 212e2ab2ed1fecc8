"""Methods of the area sparse."""
