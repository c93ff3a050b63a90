"""Weight-only int8 and int4 quantization with per-channel or per-group scales.

A token costs the time of reading every weight, so half the bytes are nearly twice the speed, in
half the memory. Activations, norms, sums and the cache stay as they are. Routers keep their
weights: they are small, and a wrong choice is no small error.
"""

from equigemma.quantize._groupwise import GroupwiseEinsum as GroupwiseEinsum
from equigemma.quantize._groupwise import GroupwiseEmbedding as GroupwiseEmbedding
from equigemma.quantize._groupwise import GroupwiseExperts as GroupwiseExperts
from equigemma.quantize._int4_groups import Int4Groups as Int4Groups
from equigemma.quantize._int8_groups import Int8Groups as Int8Groups
from equigemma.quantize._model import dequantize as dequantize
from equigemma.quantize._model import int4 as int4
from equigemma.quantize._model import int8 as int8
from equigemma.quantize._model import quantization_error as quantization_error
from equigemma.quantize._model import quantization_of as quantization_of
from equigemma.quantize._model import quantize_like as quantize_like
from equigemma.quantize._per_channel import Int8Einsum as Int8Einsum
from equigemma.quantize._per_channel import Int8Embedding as Int8Embedding
from equigemma.quantize._per_channel import Int8Experts as Int8Experts
