"""Interpretability: capture what flows between the modules of a model."""

from equigemma.interpret._capture import Call as Call
from equigemma.interpret._capture import capture as capture
