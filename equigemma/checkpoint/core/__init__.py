"""Code common to all formats: lazily read weights, key maps, safetensors, tokenizer files."""

from equigemma.checkpoint.core._errors import CheckpointError as CheckpointError
from equigemma.checkpoint.core._errors import about as about
from equigemma.checkpoint.core._files import new_file as new_file
from equigemma.checkpoint.core._files import new_folder as new_folder
from equigemma.checkpoint.core._json import read_json as read_json
from equigemma.checkpoint.core._json import write_json as write_json
from equigemma.checkpoint.core._keymap import Assignment as Assignment
from equigemma.checkpoint.core._keymap import fill as fill
from equigemma.checkpoint.core._keymap import leaf_shapes as leaf_shapes
from equigemma.checkpoint.core._keymap import leaves as leaves
from equigemma.checkpoint.core._keymap import plan as plan
from equigemma.checkpoint.core._skeleton import skeleton as skeleton
