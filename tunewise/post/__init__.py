"""What is done to weights after a run."""
