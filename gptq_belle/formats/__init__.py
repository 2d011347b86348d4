"""Bytes: the packed GPTQ format, its configuration, packed heads, and the cipher of BELLE-LLaMA. No directories."""
