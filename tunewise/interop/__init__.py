"""Checkpoints of other libraries: PEFT, Hugging Face."""
