"""Architectures, decoder configuration, sizes and the BELLE catalogue, from config.json. No file access."""
