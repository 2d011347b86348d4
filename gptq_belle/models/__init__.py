"""What differs between architectures, as tables and arithmetic on config.json. Reads and writes no files."""
