"""What fine-tuning has to beat: baselines without training of the base model."""
