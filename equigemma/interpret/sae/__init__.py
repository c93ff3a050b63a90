"""Sparse autoencoders and transcoders: encode, decode, load Gemma Scope, splice into a model."""

from equigemma.interpret.sae._gemma_scope import load as load
from equigemma.interpret.sae._measures import l0 as l0
from equigemma.interpret.sae._measures import loss_recovered as loss_recovered
from equigemma.interpret.sae._measures import variance_explained as variance_explained
from equigemma.interpret.sae._modules import AbstractSAE as AbstractSAE
from equigemma.interpret.sae._modules import Gated as Gated
from equigemma.interpret.sae._modules import JumpReLU as JumpReLU
from equigemma.interpret.sae._modules import TopK as TopK
from equigemma.interpret.sae._splice import Place as Place
from equigemma.interpret.sae._splice import features as features
from equigemma.interpret.sae._splice import inputs as inputs
from equigemma.interpret.sae._splice import splice as splice
