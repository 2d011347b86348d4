"""What differs between architectures, as tables."""
