"""Folders of this library's own, for quantized models."""
