"""Methods of the area prompt."""
