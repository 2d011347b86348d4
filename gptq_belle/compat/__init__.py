"""Interfaces of other programs: transformers' from_pretrained, and AutoGPTQ's classes."""
