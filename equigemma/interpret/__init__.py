"""Interpretability: read and replace what flows between the modules of a model.

A model is a value, and so is an intervention: arrays that are inputs of a pure function, which
`jit`, `vmap` and `grad` take like any other, and a cached decoding loop too. The table of what can
be read and replaced is in the docstring of `interpret.sites`.
"""

from equigemma.interpret._activations import activations as activations
from equigemma.interpret._capture import Call as Call
from equigemma.interpret._capture import capture as capture
from equigemma.interpret._change import At as At
from equigemma.interpret._change import at as at
from equigemma.interpret._patch import patch as patch
from equigemma.interpret._sites import Site as Site
from equigemma.interpret._sites import sites as sites
