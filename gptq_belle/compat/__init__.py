"""Other programs' interfaces: transformers' own loading, and AutoGPTQ's classes."""
