"""Methods of the area side."""
