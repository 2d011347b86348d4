"""What the machine can do and what we reach of it: time, memory, self-description."""
