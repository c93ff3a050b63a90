"""What all formats share: lazily read weights, key maps, safetensors and tokenizer files."""
