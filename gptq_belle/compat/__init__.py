"""Other programs' interfaces on this one: transformers' own loading, and AutoGPTQ's classes."""
