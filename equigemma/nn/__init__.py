"""The Equinox modules that a model is made of, and the functions that they are made of."""

from equigemma.nn._attention import AbstractAttend as AbstractAttend
from equigemma.nn._attention import Attend as Attend
from equigemma.nn._attention import Attention as Attention
from equigemma.nn._attention import attend as attend
from equigemma.nn._attention import attention_weights as attention_weights
from equigemma.nn._block import Block as Block
from equigemma.nn._cache import ByteKVCache as ByteKVCache
from equigemma.nn._cache import Cache as Cache
from equigemma.nn._cache import KVCache as KVCache
from equigemma.nn._cache import capacity as capacity
from equigemma.nn._cache import init_cache as init_cache
from equigemma.nn._einsum import AbstractEinsum as AbstractEinsum
from equigemma.nn._einsum import Einsum as Einsum
from equigemma.nn._embed import AbstractEmbedding as AbstractEmbedding
from equigemma.nn._embed import Embedding as Embedding
from equigemma.nn._ffw import GatedFeedForward as GatedFeedForward
from equigemma.nn._norm import LayerNorm as LayerNorm
from equigemma.nn._norm import RMSNorm as RMSNorm
from equigemma.nn._rope import rotate as rotate
from equigemma.nn._rope import rotation as rotation
from equigemma.nn._transformer import Output as Output
from equigemma.nn._transformer import Transformer as Transformer
from equigemma.nn._vision import Vision as Vision
from equigemma.nn._vision import insert as insert
from equigemma.nn._vision import pixels as pixels
from equigemma.nn._vision import places as places
