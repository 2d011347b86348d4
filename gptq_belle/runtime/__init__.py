"""From a packed checkpoint to tokens."""
