"""Preset `max`: end-to-end tuning of scales, biases and norms after the last block, codes fixed."""
