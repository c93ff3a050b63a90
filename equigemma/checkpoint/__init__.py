"""Checkpoints: files to pytrees and back, in the format that `load` and `save` find out."""

from equigemma.checkpoint._load import load as load
from equigemma.checkpoint._load import load_chat_template as load_chat_template
from equigemma.checkpoint._load import load_config as load_config
from equigemma.checkpoint._load import load_embedder as load_embedder
from equigemma.checkpoint._load import load_model as load_model
from equigemma.checkpoint._save import save as save
from equigemma.checkpoint.core._errors import CheckpointError as CheckpointError
