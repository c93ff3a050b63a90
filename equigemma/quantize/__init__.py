"""Weights in few bits: integers, and scales that say what a step is worth.

A token costs the time of reading every weight, so half the bytes are nearly twice the speed, in
half the memory. Activations, norms, sums and the cache stay as they are. Routers keep their
weights: they are small, and a wrong choice is no small error.
"""

from equigemma.quantize._grouped import GroupEinsum as GroupEinsum
from equigemma.quantize._grouped import GroupEmbedding as GroupEmbedding
from equigemma.quantize._grouped import GroupExperts as GroupExperts
from equigemma.quantize._groups import ByteGroups as ByteGroups
from equigemma.quantize._model import dequantize as dequantize
from equigemma.quantize._model import errors as errors
from equigemma.quantize._model import int4 as int4
from equigemma.quantize._model import int8 as int8
from equigemma.quantize._nibbles import NibbleGroups as NibbleGroups
from equigemma.quantize._rows import QuantEinsum as QuantEinsum
from equigemma.quantize._rows import QuantEmbedding as QuantEmbedding
from equigemma.quantize._rows import QuantExperts as QuantExperts
