"""Low-rank adapters as tree transforms: add, split, merge, stack.

An adapter wraps an `AbstractEinsum` or an `AbstractEmbedding` of any kind, so adapters over
quantised weights, or over other adapters, need no code of their own. Nothing in `equigemma.nn`
knows of them. For files of adapters see `equigemma.peft`.
"""

from equigemma.lora._adapters import Adapter as Adapter
from equigemma.lora._adapters import DoRAEinsum as DoRAEinsum
from equigemma.lora._adapters import LoRAEinsum as LoRAEinsum
from equigemma.lora._adapters import product as product
from equigemma.lora._add import add as add
from equigemma.lora._add import is_projection as is_projection
from equigemma.lora._embedding import LoRAEmbedding as LoRAEmbedding
from equigemma.lora._many import stack as stack
from equigemma.lora._many import take as take
from equigemma.lora._merge import MergedEinsum as MergedEinsum
from equigemma.lora._merge import merge as merge
from equigemma.lora._merge import unmerge as unmerge
from equigemma.lora._tree import adapters as adapters
from equigemma.lora._tree import einsums as einsums
from equigemma.lora._tree import remove as remove
from equigemma.lora._tree import replace as replace
from equigemma.lora._tree import split as split
from equigemma.lora._tree import trainable as trainable
from equigemma.lora._tree import transfer as transfer
