"""Preset `max`: refine codes and scales of all linears of a block together, towards the block's own output."""
