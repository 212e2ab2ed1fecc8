"""Methods of the area existing."""
