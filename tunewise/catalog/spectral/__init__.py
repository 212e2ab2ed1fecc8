"""Methods of the area spectral."""
