"""What happens at prediction time."""
