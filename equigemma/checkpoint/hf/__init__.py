"""Folders in the layout of Hugging Face Transformers, and the hub."""
