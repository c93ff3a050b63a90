"""Folders of `sentence-transformers`: text-embedding models."""
