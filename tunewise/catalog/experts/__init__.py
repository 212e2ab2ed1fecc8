"""Methods of the area experts."""
