"""Methods of the area adapters."""
