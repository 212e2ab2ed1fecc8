"""Methods of the area head."""
