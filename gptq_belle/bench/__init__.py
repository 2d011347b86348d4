"""What the machine can do and what we reach of it: throughput, memory, kernel tuning, self-description."""
