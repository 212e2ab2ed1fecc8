"""What a run will cost, before any weight is loaded."""
