"""Code common to all formats: lazily read weights, key maps, safetensors, tokenizer files."""
