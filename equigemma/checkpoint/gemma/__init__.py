"""Parameter trees, configs and Orbax checkpoints of DeepMind's `gemma` package."""

from equigemma.checkpoint.gemma._config_fields import config_from_upstream as config_from_upstream
from equigemma.checkpoint.gemma._config_vision import seeing as seeing
from equigemma.checkpoint.gemma._params import from_params as from_params
from equigemma.checkpoint.gemma._params import names as names
from equigemma.checkpoint.gemma._params import to_params as to_params
