"""Inference: weight loading, decoders, attention, KV cache, sampling and continuous batching."""
