"""Model directories on disk: read, validate, write, convert, decrypt and download."""
