"""Interpretability: read and replace what flows between the modules of a model.

A model is a value, and so is an intervention: arrays that are inputs of a pure function, which
`jit`, `vmap` and `grad` take like any other, and a cached decoding loop too. The table of what can
be read and replaced is in the docstring of `interpret.sites`.
"""

from equigemma.interpret import graph as graph
from equigemma.interpret import sae as sae
from equigemma.interpret._activations import activations as activations
from equigemma.interpret._attribution import attribution as attribution
from equigemma.interpret._attribution import integrated_gradients as integrated_gradients
from equigemma.interpret._capture import Call as Call
from equigemma.interpret._capture import capture as capture
from equigemma.interpret._change import At as At
from equigemma.interpret._change import at as at
from equigemma.interpret._edges import edge_attribution as edge_attribution
from equigemma.interpret._edges import path_patch as path_patch
from equigemma.interpret._edges import stream_writers as stream_writers
from equigemma.interpret._fitted_lens import JacobianLens as JacobianLens
from equigemma.interpret._fitted_lens import TunedLens as TunedLens
from equigemma.interpret._fitted_lens import fit_jacobian_lens as fit_jacobian_lens
from equigemma.interpret._fitted_lens import fit_tuned_lens as fit_tuned_lens
from equigemma.interpret._fitted_lens import tuned_lens_loss as tuned_lens_loss
from equigemma.interpret._lens import attention_rollout as attention_rollout
from equigemma.interpret._lens import logit_attribution as logit_attribution
from equigemma.interpret._lens import logit_lens as logit_lens
from equigemma.interpret._patch import patch as patch
from equigemma.interpret._sites import Site as Site
from equigemma.interpret._sites import sites as sites
from equigemma.interpret._steering import Ablate as Ablate
from equigemma.interpret._steering import Add as Add
from equigemma.interpret._steering import LinearProbe as LinearProbe
from equigemma.interpret._steering import Where as Where
from equigemma.interpret._steering import direction as direction
from equigemma.interpret._sweep import plot as plot
from equigemma.interpret._sweep import sweep as sweep
