"""Bytes on disk: the packed format, and the readers and writers of model directories."""
