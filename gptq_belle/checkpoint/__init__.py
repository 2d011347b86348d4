"""A model directory on disk: reading, validating, writing, converting, decrypting and downloading it."""
