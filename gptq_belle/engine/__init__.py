"""From a checkpoint to tokens: decoders, attention, the KV cache, sampling and continuous batching."""
