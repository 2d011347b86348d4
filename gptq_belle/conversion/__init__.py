"""Quantized checkpoints of other tools and other times, brought into the standard form."""
