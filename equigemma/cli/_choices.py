"""Choices of options that several commands share."""

from typing import Literal


CheckpointFormat = Literal["huggingface", "gguf", "orbax", "orbax-flat"]
"""Formats that are written."""

StoredDType = Literal["bfloat16", "float32", "float16", "q8_0"]
"""Dtypes of the weights of a file; q8_0 is one of .gguf files."""
